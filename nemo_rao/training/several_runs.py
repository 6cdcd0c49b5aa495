"""Several runs of one command, in sequence: all are checked before the first starts, each in a child process.

    PlannedRun, ... -> check_runs -> train_runs: a single import of NeMo -> a fork of it for each run -> how it ended

Separate children keep Megatron's process groups and random numbers out of the next run. Runs of one
``exp_manager.exp_dir`` share the cache of reference log-probabilities. A run that reached its end is not started again,
one that was interrupted resumes.

SLURM (srun) and torchrun: every rank walks the same list and starts its own part of each run; ranks meet at
``MASTER_PORT`` + the run's number, so as many ports above it must be free. Only the first rank prints and writes. A
failing run ends the series there, since only the launcher can stop the run's other ranks; the same command continues
from there.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rao.checkpoint.continuing import check_settings
from nemo_rao.checkpoint.run_records import has_results
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import RankFailure, errors_at, report
from nemo_rao.runtime.child import Child, end
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.training.checks import check_run

if TYPE_CHECKING:
    from nemo_rao.training.loading import LoadedData

State = Literal["finished", "failed"]

_GRACE_SECONDS = 15.0  # within which an interrupted run has to end its ranks


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs.

    Attributes:
        name: its ``exp_manager.name``.
        label: what distinguishes it from the others, a prefix of messages; may be empty.
        config: the whole run.
    """

    name: str
    label: str
    config: RunConfig


def check_runs(runs: Sequence[PlannedRun], *, another: str = "exp_manager.name") -> None:
    """Check every run before any starts: its recipe, and what has changed since it was started. Nothing is written.

    Args:
        another: the option or key that selects another directory for results.

    Raises:
        UserError: the first error, with the label of its run.
    """
    for run in runs:
        with errors_at(run.label):
            check_run(run.config)
            check_settings(run.config, another=another)


def train_runs(runs: Sequence[PlannedRun]) -> Iterator[State]:
    """Train checked runs in order; yields the state of each when it ends.

    Raises:
        UserError: the data or a checkpoint cannot be used: the first such run stops all.
        RankFailure: under SLURM or torchrun, a run failed. Elsewhere it is reported, and the next run starts.
    """
    from nemo_rao.runtime.console import quiet_third_parties, say
    from nemo_rao.runtime.launch import started_externally

    quiet_third_parties()
    finished = in_child(finished_runs, runs, name="the check of finished runs")
    if len(finished) < len(runs):
        load_engine([run.config for run in runs])
    for number, run in enumerate(runs, start=1):
        state: State = "finished"
        say(f"\n[{number}/{len(runs)}] {run.name}{': finished before' if run.name in finished else ''}")
        if run.name not in finished:
            try:
                train_one(run, number)
            except RankFailure as error:
                if started_externally():
                    raise
                report(RankFailure(f"{run.name}: {error}"))
                state = "failed"
        yield state


def load_engine(configs: Sequence[RunConfig]) -> None:
    """Import the engine of the runs, once for the forks that train them. All use the same engine.

    Raises:
        UserError: the engine is not installed, or a device or ranks are missing.
    """
    from nemo_rao.engines.engine import engine_of
    from nemo_rao.training.devices import check_ranks_started, select_device

    for config in configs:
        check_ranks_started(config)
        select_device(config)
    engine_of(configs[0]).load()


def train_one(run: PlannedRun, number: int = 0) -> None:
    """Train a checked run in a child process, or resume it.

    Args:
        number: of the run; ranks that were started by a launcher use a different port for each.

    Raises:
        UserError: the data or a checkpoint cannot be used.
        RankFailure: the run failed.
    """
    in_child(_train, run.config, number, name=f"run {run.name}")


def finished_runs(
    runs: Sequence[PlannedRun],
    loaded: dict[str, LoadedData] | None = None,
    *,
    another: str = "exp_manager.name",
) -> set[str]:
    """The names of the runs that are complete, given the present contents of their data files.

    Reads that data without output. Call it in a child: tokenizers that have been used in this process
    would be slow in its forks.

    Args:
        loaded: data by :func:`nemo_rao.training.loading.data_identity`; what is read is added.
        another: see :func:`check_runs`.

    Raises:
        UserError: the data of a run has changed.
    """
    from nemo_rao.training.loading import data_identity, drawn, load_data
    from nemo_rao.training.steps import plan_steps

    loaded = {} if loaded is None else loaded
    found = set()
    for run in runs:
        if not has_results(run_dir(run.config)):
            continue
        with errors_at(run.name), contextlib.redirect_stdout(io.StringIO()):
            identity = data_identity(run.config)
            if identity not in loaded:
                loaded[identity] = load_data(run.config)
            data = loaded[identity]
            train = drawn(run.config, data)
            if plan_steps(run.config, train, data.validation, another=another).finished_at is not None:
                found.add(run.name)
    return found


def last_values(config: RunConfig) -> dict[str, float]:
    """The last value of each metric of a run; ``step`` is the last step."""
    last: dict[str, float] = {}
    for record in read_metrics(run_dir(config) / "metrics.jsonl"):
        last |= record
    return last


def write_results(path: Path, text: str) -> None:
    """Write a file of results atomically, on the first rank only."""
    from nemo_rao.runtime.console import is_first_rank

    if is_first_rank():
        write_atomically(path, text)


def print_table(table: Any) -> None:
    """Print a table of ``rich``, on the first rank only."""
    from rich.console import Console

    from nemo_rao.runtime.console import say

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    with console.capture() as printed:
        console.print(table)
    say(f"\n{printed.get().rstrip()}")


# --------------------------------------------------------------------------------------------------- child processes


def in_child(function: Callable[..., Any], *args: Any, name: str) -> Any:
    """Call ``function(*args)`` in a child process.

    Args:
        name: for messages, such as "run gpt_dpo".

    Raises:
        UserError, RankFailure: the function raised it, or the child was killed.
    """
    child = Child(function, args, name=name, interruptible=True)
    try:
        outcome = child.wait()
    except BaseException:
        end([child], grace=_GRACE_SECONDS, interrupt=True)  # the child ends its ranks
        raise
    return child.value_of(outcome)


def _train(config: RunConfig, number: int) -> None:
    from nemo_rao.training.train import train

    _meet_at_own_port(number)
    train(config)


def _meet_at_own_port(number: int) -> None:
    """Give ranks that were started by a launcher a new port: a rank that is ahead could meet ranks of the last run.

    torchrun keeps its store open, which would still contain the keys of the last run.
    """
    from nemo_rao.runtime.launch import started_externally

    launcher = started_externally()
    if launcher is None:
        return
    # The same on every rank of a job, and different from that of other jobs on the node.
    default = 15000 + int(os.environ["SLURM_JOB_ID"][-4:]) if launcher == "slurm" else 29500
    os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", default)) + number)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
