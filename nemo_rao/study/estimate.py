"""Estimate the remaining work of a study and its time, from existing runs and from plans for GPUs."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.checkpoint.run_records import read_run
from nemo_rao.config.derived import run_dir
from nemo_rao.errors import UserError
from nemo_rao.planning.plan import machine_of, setting_of
from nemo_rao.planning.plan_data import run_length, size_of
from nemo_rao.planning.whole_run import run_time
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.study.planned import Plan, StudyRun


@dataclass(frozen=True)
class Expected:
    """The expected remainder of a run.

    Attributes:
        state: "finished", "to continue" or "to do".
        steps: optimizer steps left; ``None``: unknown until its data exists.
        seconds: their time; ``None``: unknown.
        source: description of where the time comes from.
    """

    run: StudyRun
    state: str
    steps: int | None
    seconds: float | None
    source: str


def expected(made: Plan, planning: argparse.Namespace | None) -> list[Expected]:
    """Estimate what is left of each run.

    Args:
        planning: options of ``nemo-rao plan``, for arms without a trained run; ``None``: their times are unknown.
    """
    measured = {run.name: _seconds_per_step(run) for run in made.runs}
    found, planned = [], {}
    for run in made.runs:
        if run.arm not in planned:
            planned[run.arm] = _planned(run, planning)
        steps, seconds_per_step = planned[run.arm]
        known = [seconds for one in made.runs_of(run.arm) if (seconds := measured[one.name]) is not None]
        source = "planned"
        if known:
            seconds_per_step, source = statistics.median(known), "measured in this study"
        folder = run_dir(run.config)
        record, checkpoint = read_run(folder), last_checkpoint(folder)
        steps = record.get("max_steps") if steps is None else steps
        if "finished_at" in record and steps is not None and record["finished_at"] >= steps:
            found.append(Expected(run, "finished", 0, 0.0, ""))
            continue
        done = 0 if checkpoint is None else max(0, step_of(checkpoint))
        left = None if steps is None else max(0, steps - done)
        seconds = None if left is None or seconds_per_step is None else left * seconds_per_step
        found.append(Expected(run, "to continue" if done else "to do", left, seconds, source))
    return found


def _seconds_per_step(run: StudyRun) -> float | None:
    """Return the median time of the logged steps, with everything a step does."""
    of_steps = [
        sum(value for name, value in record.items() if name.startswith("seconds/"))
        for record in read_metrics(run_dir(run.config) / "metrics.jsonl")
        if "seconds/update" in record
    ]
    return statistics.median(of_steps) if of_steps else None


def _planned(run: StudyRun, planning: argparse.Namespace | None) -> tuple[int | None, float | None]:
    """Return the steps of the whole run, and the seconds of a step with its overheads; ``None``: unknown."""
    try:
        training, validation = size_of(run.config, run.config.data.train_path), None
        if training is not None:
            validation = size_of(run.config, run.config.data.validation_path)
        length = run_length(run.config, training=training, validation=validation)
    except (UserError, OSError):
        length = None
    if length is None:
        return None, None
    if planning is None:
        return length.steps, None
    try:
        setting = setting_of(run.config)
    except UserError:  # the tokenizer does not exist yet, or the planner does not support the network
        return length.steps, None
    return length.steps, run_time(length, setting, machine_of(planning, setting)).total / length.steps
