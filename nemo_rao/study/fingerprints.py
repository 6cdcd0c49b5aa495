"""Fingerprints, as JSON, of what data and samples were made from: results are reused only while these are equal."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import resolve_checkpoint
from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.rows.sources import expand_paths
from nemo_rao.scoring.judge_config import load_judge
from nemo_rao.scoring.rule import RuleScorer
from nemo_rao.scoring.run import KINDS
from nemo_rao.scoring.scorer import Kind, parse_spec

# Keys of a judge on which its scores do not depend.
_OPERATIONAL = ("api_key_variable", "concurrency", "timeout", "retries", "backoff", "engine", "batch_size", "cache")


def parsed_scorer(spec: str) -> tuple[str, str, str]:
    """Return column, kind and argument of ``[NAME=]KIND:ARGUMENT``, for the kinds of ``nemo-rao score``.

    Raises:
        UserError: it does not have this form, or the kind is unknown.
    """
    return parse_spec(spec, {**KINDS, "model": Kind(_never_made, lambda path: Path(path).name, "RUN_FOLDER")})


def of_scorer(spec: str) -> Mapping[str, Any]:
    """Describe a scorer with its source: a rule's code, a judge's question, a model's checkpoint.

    Raises:
        UserError: it cannot be used.
    """
    column, kind, argument = parsed_scorer(spec)
    found: dict[str, Any] = {"column": column, "kind": kind, "argument": argument}
    if kind == "rule":
        found |= RuleScorer(argument).identity
    elif kind == "judge":
        config, _ = load_judge(argument)
        found["keys"] = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OPERATIONAL}
    elif kind == "model":
        found |= of_checkpoint(Path(argument).expanduser(), "scorer")
    return found


def of_checkpoint(folder: Path, key: str) -> Mapping[str, Any]:
    """Describe a checkpoint, or the last one of a run, with the run's recipe.

    Args:
        key: key that names it, for errors.

    Raises:
        UserError: there is no checkpoint.
    """
    recipe = folder / RECIPE
    return {
        "checkpoint": str(resolve_checkpoint(str(folder), key)),
        "recipe": _digest(recipe) if recipe.is_file() else None,
    }


def of_rows(given: str) -> list[str]:
    """Return digests of the files that ``data.train_path`` would read, or names where it is not a file.

    Raises:
        UserError: there are none.
    """
    return [_digest(Path(path)) if Path(path).is_file() else str(path) for path in expand_paths(given)]


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()[:32]


def _never_made(*_: object) -> Any:
    raise AssertionError("model scorers are created when they score")
