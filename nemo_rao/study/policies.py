"""Policies that a study samples and evaluates, once each.

    checkpoint -> export-hf -> generate -> score -> samples/NAME.scored.jsonl -> wins between two policies
                            -> tasks of lm-evaluation-harness -> tasks/NAME/results.json

Each step runs in its own process, since a conversion must not see GPUs and sampling must. Results are kept with a
record of what they were made from; an interrupted step is resumed. The exported model is removed afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.config.derived import objective_config
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import errors_at
from nemo_rao.objectives import registry
from nemo_rao.rows.sources import expand_paths
from nemo_rao.runtime.files import write_atomically
from nemo_rao.scoring.judge_config import load_judge
from nemo_rao.scoring.rule import find_function
from nemo_rao.study import fingerprints, policy_steps
from nemo_rao.study.schema import Samples, Tasks
from nemo_rao.training.several_runs import in_child

SAMPLES, TASKS, EXPORTED, LOGS = "samples", "tasks", "exported", "logs"
_VERSION = 2  # increased when the same study would write other files


@dataclass(frozen=True)
class Policy:
    """A policy to sample or evaluate.

    Attributes:
        name: prefix of its files.
        checkpoint: a checkpoint, or the directory of a run.
    """

    name: str
    checkpoint: Path


def check_samples(samples: Samples, prompts: str, scorer: str, *, ready: bool) -> None:
    """Check what can be checked before any policy exists.

    Args:
        prompts, scorer: with references resolved.
        ready: whether the files of ``prompts`` exist already.

    Raises:
        UserError: names the key.
    """
    with errors_at("samples.scorer"):
        _, kind, argument = fingerprints.parsed_scorer(scorer)
        if kind == "rule":
            find_function(argument)
        elif kind == "judge":
            load_judge(argument)
    if ready:
        with errors_at("samples.prompts"):
            expand_paths(prompts)


def check_tasks(tasks: Tasks) -> None:
    """Refuse tasks that lm-evaluation-harness does not have. Imports it, in a child process.

    Raises:
        UserError: a task is unknown, or the library is not installed.
    """
    from nemo_rao.generation.harness import task_manager

    with errors_at("tasks"):
        in_child(_find_tasks, task_manager, tasks.names, tasks.include_path, name="the check of tasks")


def _find_tasks(task_manager: Callable[..., Any], names: Sequence[str], include_path: str | None) -> None:
    task_manager(names, include_path)  # its result cannot be sent to the parent


def examine(
    folder: Path, policy: Policy, samples: Samples | None, prompts: str, scorer: str, tasks: Tasks | None
) -> None:
    """Sample, score and evaluate one policy; return at once if that is done.

    Args:
        folder: directory of the study.
        samples, tasks: what to do; ``None``: nothing.
        prompts, scorer: those of ``samples``, with references resolved.

    Raises:
        UserError: the checkpoint, the prompts or the scorer cannot be used.
        RankFailure: a step failed; its output is in ``logs``.
    """
    scored, record = scored_file(folder, policy), _record_file(folder, policy)
    made_from = _made_from(policy, samples, prompts, scorer, tasks)
    done = json.loads(record.read_text()) if record.is_file() else {}
    if done.get("work") != made_from:
        _remove_results(folder, policy)
        done = {"work": made_from, "finished": False}
        write_atomically(record, json.dumps(done, indent=2) + "\n")
    if done["finished"]:
        return
    model, log = folder / EXPORTED / policy.name, folder / LOGS / f"{policy.name}.log"

    def step(function: Callable[..., None], *args: Any, name: str) -> None:
        in_child(policy_steps.logged, log, function, *args, name=f"{name} of {policy.name}")

    shutil.rmtree(model, ignore_errors=True)  # left by an interrupted export, perhaps of an earlier checkpoint
    step(policy_steps.export, policy.checkpoint, model, name="export")
    if samples is not None and not scored.exists():
        raw = folder / SAMPLES / f"{policy.name}.jsonl"
        if not raw.exists():
            step(policy_steps.generate_samples, model, prompts, raw, samples, name="samples")
        model_of_ratio = policy.checkpoint if samples.log_ratio and beta_of(policy) is not None else None
        step(policy_steps.score_samples, raw, scored, scorer, model_of_ratio, name="scores")
    if tasks is not None:
        step(policy_steps.evaluate_tasks, model, folder / TASKS / policy.name, tasks, name="tasks")
    write_atomically(record, json.dumps({"work": made_from, "finished": True}, indent=2) + "\n")
    shutil.rmtree(model, ignore_errors=True)


def is_examined(folder: Path, policy: Policy) -> bool:
    """Whether it has results. :func:`examine` detects results of another checkpoint."""
    record = _record_file(folder, policy)
    return record.is_file() and bool(json.loads(record.read_text()).get("finished"))


def beta_of(policy: Policy) -> float | None:
    """Return the implicit reward per nat of log-ratio; ``None`` if the objective has no reference or no beta."""
    recipe = policy.checkpoint / RECIPE
    if not recipe.is_file():
        return None
    config = load_recipe(recipe)
    keys = objective_config(config)
    beta = vars(keys).get("beta")
    return beta if beta and registry.get(config.model.objective).needs_of(keys).reference else None


def scored_file(folder: Path, policy: Policy) -> Path:
    """Path of the rows with a policy's samples and their rewards."""
    return folder / SAMPLES / f"{policy.name}.scored.jsonl"


def _record_file(folder: Path, policy: Policy) -> Path:
    return folder / SAMPLES / f"{policy.name}.work.json"


def _made_from(
    policy: Policy, samples: Samples | None, prompts: str, scorer: str, tasks: Tasks | None
) -> dict[str, Any]:
    """Return all that a policy's results depend on, as JSON types."""
    found: dict[str, Any] = {"version": _VERSION, **fingerprints.of_checkpoint(policy.checkpoint, "start")}
    if samples is not None:
        chosen = {name: value for name, value in asdict(samples).items() if name not in ("against", "batch_size")}
        found["samples"] = {
            **chosen,
            "prompts": fingerprints.of_rows(prompts),
            "scorer": fingerprints.of_scorer(scorer),
        }
    if tasks is not None:
        found["tasks"] = {name: value for name, value in asdict(tasks).items() if name != "batch_size"}
    as_read: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, to compare with the file
    return as_read


def _remove_results(folder: Path, policy: Policy) -> None:
    """Remove results of another checkpoint, or of other settings."""
    for file in (folder / SAMPLES).glob(f"{policy.name}.*"):
        if file.is_file():
            file.unlink()
    shutil.rmtree(folder / TASKS / policy.name, ignore_errors=True)
