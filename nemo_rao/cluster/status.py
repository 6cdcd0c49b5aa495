"""``nemo-rao status RUN``: report its jobs, the last step and its metrics, and the last checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.checkpoint.run_records import read_run
from nemo_rao.cluster.follow import follow
from nemo_rao.cluster.records import JobRecord, last_words, read_records
from nemo_rao.cluster.slurm import job_states
from nemo_rao.errors import UserError
from nemo_rao.runtime.metrics_file import read_metrics

_SHOWN = ("loss", "val/loss", "grad_norm", "lr", "rewards/margins", "rewards/accuracies", "tokens_per_second")
_JOBS = 3  # newest jobs to show per run


def main(arguments: argparse.Namespace) -> int:
    runs = [Path(run).expanduser() for run in arguments.runs]
    for run in runs:
        if not (run / "recipe.yaml").is_file() and not read_records(run):
            raise UserError(f"{run}: is not the directory of a run (exp_manager.exp_dir/exp_manager.name). Name one.")
    if arguments.follow:
        if len(runs) != 1 or not (records := read_records(runs[0])):
            raise UserError(f"--follow {' '.join(arguments.runs)}: needs exactly one run, launched as a job.")
        print("\n".join(lines(runs[0])), flush=True)
        return follow(runs[0], records[-1:], poll_seconds=arguments.poll_seconds, from_end=True)
    print("\n\n".join("\n".join(lines(run)) for run in runs))
    return 0


def lines(run: Path) -> Iterator[str]:
    """Yield the lines of a run's report."""
    yield f"run         {run}"
    records = read_records(run)
    for record in records[-_JOBS:]:
        yield f"job         {_of_job(record)}"
    if records:
        yield f"logs        {records[-1].log}, and by rank {records[-1].rank_log(run, 0).with_name('rank-*.log')}"
    metrics = read_metrics(run / "metrics.jsonl")
    if metrics:
        last: dict[str, float] = {}
        for record_of_step in metrics:
            last |= record_of_step
        yield f"step        {last['step']:g}{_of_how_many(run)}"
        shown = [name for name in last if name in _SHOWN or name.startswith("rao/")]
        yield "metrics     " + ", ".join(f"{name} {last[name]:.5g}" for name in shown)
    else:
        yield "step        none yet"
    checkpoint = last_checkpoint(run)
    yield f"checkpoint  {checkpoint if checkpoint is not None else 'none yet'}"


def _of_job(record: JobRecord) -> str:
    words = last_words(Path(record.log))
    try:
        states = job_states(record.job)
    except UserError as error:
        states, words = [], f"{words or 'no output yet'} ({error})"
    if not states:
        return f"{record.job}, no longer known to SLURM; its last line: {words or 'none'}"
    text = str(states[0]).removeprefix("job ")
    return text if states[0].is_active or not words else f"{text}: {words}"


def _of_how_many(run: Path) -> str:
    steps = read_run(run).get("max_steps")
    return f" of {steps}" if steps is not None else ""
