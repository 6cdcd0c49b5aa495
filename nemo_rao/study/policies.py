"""What a study's policies say: each is exported, sampled, scored and evaluated, once.

    checkpoint -> export-hf -> generate -> score -> samples/NAME.scored.jsonl -> wins between two policies
                            -> tasks of lm-evaluation-harness -> tasks/NAME/results.json

Each part is done in a process of its own, since a conversion must not see GPUs and sampling must. What is finished is
kept with a record of what it was made from; an interrupted part is continued. The exported model is removed afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import resolve_checkpoint
from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.config.derived import objective_config
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import RankFailure, errors_at
from nemo_rao.objectives import registry
from nemo_rao.rows.reading import read_rows
from nemo_rao.rows.sources import expand_paths
from nemo_rao.runtime.files import write_atomically
from nemo_rao.scoring.rule import find_function, rules_among
from nemo_rao.scoring.run import KINDS, Job
from nemo_rao.scoring.scorer import Kind, ScoringFailure, parse_spec
from nemo_rao.study.schema import Samples, Tasks
from nemo_rao.study.statistics import Wins, wins
from nemo_rao.training.several_runs import in_child

SAMPLES, TASKS, EXPORTED, LOGS = "samples", "tasks", "exported", "logs"
_IMPLICIT = "implicit_reward"  # column of samples
_VERSION = 1  # changed when the same study would leave other files


@dataclass(frozen=True)
class Policy:
    """One of the policies that are sampled.

    Attributes:
        name: of its files.
        checkpoint: a checkpoint, or the directory of a run.
    """

    name: str
    checkpoint: Path


@dataclass(frozen=True)
class Judged:
    """A policy's scored samples, prompt by prompt.

    Attributes:
        scores: prompt -> score of each sample, NaN where it has none.
        lengths: prompt -> characters of each sample.
    """

    scores: Mapping[str, list[float]]
    lengths: Mapping[str, list[float]]


def check_samples(samples: Samples, prompts: str, scorer: str, *, ready: bool) -> None:
    """Checks what is known before a policy is there.

    Args:
        prompts, scorer: with references resolved.
        ready: whether the files and runs that they refer to are there already.

    Raises:
        UserError: names the key.
    """
    with errors_at("samples.scorer"):
        parse_spec(scorer, {**KINDS, "model": Kind(_never, lambda path: Path(path).name, "RUN_FOLDER")})
        for path in rules_among([scorer]).values():
            find_function(path)
    if ready:
        with errors_at("samples.prompts"):
            expand_paths(prompts)


def check_tasks(tasks: Tasks) -> None:
    """Refuses tasks that lm-evaluation-harness does not have. Imports it, in a process of its own."""
    from nemo_rao.generation.harness import task_manager

    in_child(_found, task_manager, tasks.names, tasks.include_path, name="the check of tasks")


def _found(task_manager: Callable[..., Any], names: Sequence[str], include_path: str | None) -> None:
    task_manager(names, include_path)


def examine(
    folder: Path, policy: Policy, samples: Samples | None, prompts: str, scorer: str, tasks: Tasks | None
) -> None:
    """Samples, scores and evaluates one policy; returns at once where that is done.

    Args:
        folder: of the study.
        samples, tasks: ``None``: none are asked for.
        prompts, scorer: of ``samples``, with references resolved.

    Raises:
        UserError: the checkpoint, the prompts or the scorer cannot be used.
        RankFailure: a part failed; its output is in ``logs``.
    """
    scored, work_file = _scored_file(folder, policy), folder / SAMPLES / f"{policy.name}.work.json"
    work = _work(policy, samples, prompts, scorer, tasks)
    done = json.loads(work_file.read_text()) if work_file.is_file() else {}
    if done.get("work") != work:
        _forget(folder, policy)
        done = {"work": work, "finished": False}
        write_atomically(work_file, json.dumps(done, indent=2) + "\n")
    if done["finished"]:
        return
    model, log = folder / EXPORTED / policy.name, folder / LOGS / f"{policy.name}.log"
    shutil.rmtree(model, ignore_errors=True)  # of an earlier life, and perhaps of an earlier checkpoint
    in_child(_logged, log, _export, policy.checkpoint, model, name=f"export of {policy.name}")
    if samples is not None and not scored.exists():
        raw = folder / SAMPLES / f"{policy.name}.jsonl"
        if not raw.exists():
            in_child(_logged, log, _generate, model, prompts, raw, samples, name=f"samples of {policy.name}")
        model_of_ratio = policy.checkpoint if samples.log_ratio and beta_of(policy) is not None else None
        in_child(_logged, log, _score, raw, scored, scorer, model_of_ratio, name=f"scores of {policy.name}")
    if tasks is not None:
        out = folder / TASKS / policy.name
        in_child(_logged, log, _evaluate, model, out, tasks, name=f"tasks of {policy.name}")
    write_atomically(work_file, json.dumps({"work": work, "finished": True}, indent=2) + "\n")
    shutil.rmtree(model, ignore_errors=True)


def is_examined(folder: Path, policy: Policy) -> bool:
    """Whether files of it are there; they may be of another checkpoint, which :func:`examine` notices."""
    work_file = folder / SAMPLES / f"{policy.name}.work.json"
    return work_file.is_file() and bool(json.loads(work_file.read_text()).get("finished"))


def read_judged(folder: Path, policy: Policy) -> Judged:
    """A policy's scored samples."""
    scores: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    for row in read_rows(str(_scored_file(folder, policy))):
        prompt = json.dumps(row.prompt, sort_keys=True, default=str)
        found = [float("nan") if one.reward is None else one.reward for one in row.responses]
        scores.setdefault(prompt, []).extend(found)
        lengths.setdefault(prompt, []).extend(float(len(one.content)) for one in row.responses)
    return Judged(scores, lengths)


def compare(one: Judged, other: Judged) -> Wins:
    """One policy's wins over another, on the prompts that both have samples of."""
    prompts = [prompt for prompt in one.scores if prompt in other.scores]
    return wins(
        [one.scores[prompt] for prompt in prompts],
        [other.scores[prompt] for prompt in prompts],
        [one.lengths[prompt] for prompt in prompts],
        [other.lengths[prompt] for prompt in prompts],
    )


def beta_of(policy: Policy) -> float | None:
    """Implicit reward per nat of log-ratio; ``None`` where the policy's objective has no reference or no beta."""
    recipe = policy.checkpoint / RECIPE
    if not recipe.is_file():
        return None
    config = load_recipe(recipe)
    keys = objective_config(config)
    beta = vars(keys).get("beta")
    return beta if beta and registry.get(config.model.objective).needs_of(keys).reference else None


def log_ratio(folder: Path, policy: Policy) -> float:
    """Mean of log pi(y) - log pi_ref(y) over a policy's own samples, nats; NaN where it was not computed."""
    beta, found = beta_of(policy), []
    for line in _scored_file(folder, policy).read_text(encoding="utf-8").splitlines():
        found += [one[_IMPLICIT] for one in json.loads(line)["responses"] if one.get(_IMPLICIT) is not None]
    return sum(found) / len(found) / beta if found and beta is not None else math.nan


def task_metrics(folder: Path, policy: Policy) -> dict[str, float]:
    """``TASK METRIC`` -> value, without standard errors; empty where no tasks were run."""
    file = folder / TASKS / policy.name / "results.json"
    if not file.is_file():
        return {}
    return {
        f"{task} {metric.partition(',')[0]}": value
        for task, found in json.loads(file.read_text())["tasks"].items()
        for metric, value in found["metrics"].items()
        if "_stderr" not in metric and isinstance(value, (int, float))
    }


# --------------------------------------------------------------------------------------------------------------- parts


def _export(checkpoint: Path, model: Path) -> None:
    from nemo_rao.hugging_face.exporter import main

    options = {"dtype": None, "adapters": False, "base": None, "allow_pickle": False}
    main(argparse.Namespace(checkpoint=str(checkpoint), dest=str(model), **options))


def _generate(model: Path, prompts: str, output: Path, samples: Samples) -> None:
    from nemo_rao.generation.generate import generate
    from nemo_rao.generation.settings import GenerateSettings

    names = ("num_responses", "temperature", "max_new_tokens", "batch_size", "seed", "engine", "resamples")
    generate(str(model), prompts, str(output), GenerateSettings(**{name: vars(samples)[name] for name in names}))


def score_rows(job: Job) -> None:
    """``nemo-rao score``, with trained models among the scorers.

    Raises:
        UserError, RankFailure: see :func:`nemo_rao.scoring.run.score`.
    """
    from nemo_rao.scoring.run import score
    from nemo_rao.training.score_model import model_kind

    job.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        score(job, {**KINDS, "model": model_kind(job)})
    except ScoringFailure as failure:
        raise RankFailure(str(failure)) from None


def _score(raw: Path, output: Path, scorer: str, model_of_ratio: Path | None) -> None:
    """Scores samples; the implicit reward of ``model_of_ratio`` becomes a column with no part in their reward."""
    if model_of_ratio is None:
        score_rows(Job(str(raw), output, [scorer]))
    else:
        specs = [scorer, f"{_IMPLICIT}=model:{model_of_ratio}"]
        score_rows(Job(str(raw), output, specs, weight=[f"{_IMPLICIT}=0"]))


def _evaluate(model: Path, out: Path, tasks: Tasks) -> None:
    from nemo_rao.generation.evaluate import Asked, evaluate
    from nemo_rao.generation.settings import EvaluateSettings

    names = ("limit", "num_fewshot", "batch_size", "apply_chat_template")
    settings = EvaluateSettings(**{name: vars(tasks)[name] for name in names})
    evaluate(str(model), str(out), Asked(tasks.names, include_path=tasks.include_path), settings)


def _logged(log: Path, function: Callable[..., None], *args: Any) -> None:
    """``function(*args)`` with what it prints, its children included, added to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    function(*args)


def _never(*_: object) -> Any:
    raise AssertionError("made when it scores")


# --------------------------------------------------------------------------------------------------------------- files


def _scored_file(folder: Path, policy: Policy) -> Path:
    return folder / SAMPLES / f"{policy.name}.scored.jsonl"


def _work(policy: Policy, samples: Samples | None, prompts: str, scorer: str, tasks: Tasks | None) -> dict[str, Any]:
    """What the files of a policy are a function of, of JSON types."""
    checkpoint = resolve_checkpoint(str(policy.checkpoint), "start")
    recipe = policy.checkpoint / RECIPE
    work: dict[str, Any] = {"version": _VERSION, "checkpoint": str(checkpoint)}
    work["recipe"] = _digest(recipe) if recipe.is_file() else None
    if samples is not None:
        chosen = {name: value for name, value in asdict(samples).items() if name not in ("against", "batch_size")}
        work["samples"] = {
            **chosen,
            "prompts": [_digest(Path(path)) for path in expand_paths(prompts)],
            "scorer": scorer,
        }
        work["samples"]["rules"] = [
            _digest(Path(sys.modules[find_function(path).__module__].__file__ or ""))
            for path in rules_among([scorer]).values()
        ]
    if tasks is not None:
        work["tasks"] = {name: value for name, value in asdict(tasks).items() if name != "batch_size"}
    found: dict[str, Any] = json.loads(json.dumps(work))
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path.is_file() else str(path)


def _forget(folder: Path, policy: Policy) -> None:
    """Removes what was made of another checkpoint, or with other settings."""
    for file in (folder / SAMPLES).glob(f"{policy.name}.*"):
        if file.is_file():
            file.unlink()
    shutil.rmtree(folder / TASKS / policy.name, ignore_errors=True)
