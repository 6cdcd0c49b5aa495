"""Data that a study prepares before training: rows split by prompt, rows with new rewards, or a function's output."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError, errors_at
from nemo_rao.rows.reading import expand_paths
from nemo_rao.runtime.files import write_atomically
from nemo_rao.scoring.rule import find_function
from nemo_rao.scoring.run import Job
from nemo_rao.study import fingerprints
from nemo_rao.study.planned import PlannedData
from nemo_rao.study.policy_steps import score_rows
from nemo_rao.study.schema import Files, Made, Scored, Split
from nemo_rao.study.split_rows import split_rows

RECORD = "made.json"


def check_data(data: PlannedData, *, ready: bool) -> None:
    """Check what can be checked before the steps on which the data depends.

    Args:
        ready: whether it depends on no step.

    Raises:
        UserError: names the key.
    """
    where, spec = f"files.{data.name}", data.spec
    if isinstance(spec, Made):
        with errors_at(f"{where}.function"):
            function = find_function(spec.function)
        try:
            inspect.signature(function).bind(data.path, **spec.arguments)
        except TypeError as error:
            raise UserError(f"{where}.arguments: {spec.function} does not accept them ({error}).") from None
    elif ready:
        key, source = ("split", spec.split) if isinstance(spec, Split) else ("input", spec.input)
        with errors_at(f"{where}.{key}"):
            expand_paths(source)
    record = _record_file(data)
    if record.is_file() and json.loads(record.read_text())["keys"] != _keys(spec):
        raise UserError(_made_differently(data, "from other keys"))


def make_data(data: PlannedData) -> bool:
    """Make the data; return whether anything had to be done.

    Raises:
        UserError: it cannot be made, or its input or scorers have changed since it was made.
        RankFailure: a scorer failed.
    """
    spec, record = data.spec, _record_file(data)
    made_from = {"keys": _keys(spec), "contents": _contents(spec)}
    if record.is_file() and data.path.exists():
        if json.loads(record.read_text()) != made_from:
            raise UserError(_made_differently(data, "before its input or a scorer changed"))
        return False
    if not isinstance(spec, Scored):
        shutil.rmtree(data.path, ignore_errors=True)  # left by an interrupted attempt
        data.path.mkdir(parents=True)
    if isinstance(spec, Made):
        function: Callable[..., object] = find_function(spec.function)
        function(data.path, **spec.arguments)
    elif isinstance(spec, Split):
        with errors_at(f"files.{data.name}.split"):
            split_rows(spec.split, data.path, spec.held_out, spec.columns)
    elif not data.path.exists():
        names = ("weight", "standardize", "shift", "scale")
        score_rows(Job(spec.input, data.path, spec.scorer, **{name: vars(spec)[name] for name in names}))
    write_atomically(record, json.dumps(made_from, indent=2) + "\n")
    return True


def _record_file(data: PlannedData) -> Path:
    """Path of the record of what the data was made from; absent until the data is complete."""
    is_file = isinstance(data.spec, Scored)
    return data.path.with_name(f"{data.path.name}.{RECORD}") if is_file else data.path / RECORD


def _keys(spec: Files) -> dict[str, Any]:
    """Return the keys as JSON types."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return found


def _contents(spec: Files) -> dict[str, Any]:
    """Fingerprint what the keys name: rows and scorers. The code of a function is not compared."""
    if isinstance(spec, Made):
        return {}
    if isinstance(spec, Split):
        return {"split": fingerprints.of_rows(spec.split)}
    found: dict[str, Any] = {
        "input": fingerprints.of_rows(spec.input),
        "scorer": [fingerprints.of_scorer(text) for text in spec.scorer],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(found))
    return as_read


def _made_differently(data: PlannedData, how: str) -> str:
    record = _record_file(data)
    return f"files.{data.name}: {data.path} was made {how}. Give another --out, or remove it and {record.name}."
