"""Results of a finished policy: scores of its samples, win rates, log-ratio to the reference, metrics of tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rao.rows.reading import read_rows
from nemo_rao.runtime.files import read_json_lines
from nemo_rao.study.policies import TASKS, Policy, beta_of, scored_file
from nemo_rao.study.policy_steps import IMPLICIT_REWARD
from nemo_rao.study.statistics import Wins, wins


@dataclass(frozen=True)
class Judged:
    """A policy's scored samples, prompt by prompt.

    Attributes:
        scores: prompt -> score of each sample, NaN for a sample without a score.
        lengths: prompt -> characters of each sample.
    """

    scores: Mapping[str, list[float]]
    lengths: Mapping[str, list[float]]


def read_judged(folder: Path, policy: Policy) -> Judged:
    """Read a policy's scored samples."""
    scores: dict[str, list[float]] = {}
    lengths: dict[str, list[float]] = {}
    for row in read_rows(str(scored_file(folder, policy))):
        prompt = json.dumps(row.prompt, sort_keys=True, default=str)
        found = [math.nan if one.reward is None else one.reward for one in row.responses]
        scores.setdefault(prompt, []).extend(found)
        lengths.setdefault(prompt, []).extend(float(len(one.content)) for one in row.responses)
    return Judged(scores, lengths)


def compare(one: Judged, other: Judged) -> Wins:
    """Compute one policy's wins over another, on the prompts for which both have samples."""
    prompts = [prompt for prompt in one.scores if prompt in other.scores]
    return wins(
        [one.scores[prompt] for prompt in prompts],
        [other.scores[prompt] for prompt in prompts],
        [one.lengths[prompt] for prompt in prompts],
        [other.lengths[prompt] for prompt in prompts],
    )


def log_ratio(folder: Path, policy: Policy) -> float:
    """Return the mean of log pi(y) - log pi_ref(y) over a policy's samples, in nats; NaN if it was not computed."""
    beta, found = beta_of(policy), []
    for row in read_json_lines(scored_file(folder, policy)):
        found += [one[IMPLICIT_REWARD] for one in row["responses"] if one.get(IMPLICIT_REWARD) is not None]
    return sum(found) / len(found) / beta if found and beta is not None else math.nan


def task_metrics(folder: Path, policy: Policy) -> dict[str, float]:
    """Map ``TASK METRIC`` to its value, without standard errors; empty if no tasks were run."""
    file = folder / TASKS / policy.name / "results.json"
    if not file.is_file():
        return {}
    return {
        f"{task} {_metric_name(metric)}": value
        for task, found in json.loads(file.read_text(encoding="utf-8"))["tasks"].items()
        for metric, value in found["metrics"].items()
        if "_stderr" not in metric and isinstance(value, (int, float))
    }


def _metric_name(given: str) -> str:
    """Shorten lm-evaluation-harness' ``METRIC,FILTER``; a task may have one metric under several filters."""
    metric, _, of_filter = given.partition(",")
    return metric if of_filter in ("", "none") else f"{metric} ({of_filter})"
