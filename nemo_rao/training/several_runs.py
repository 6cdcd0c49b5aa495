"""Several runs of one command, one after the other: each checked before the first starts, each in a child process.

    PlannedRun, ... -> check_runs -> train_runs: the one import of NeMo -> a fork of it for each run -> how it ended

A child of its own keeps Megatron's process groups and random numbers out of the next run. Runs of one
``exp_manager.exp_dir`` share the cache of reference log-probabilities. A run that reached its end is not started again,
one that was interrupted resumes.

SLURM (srun) and torchrun: every rank walks the same list and starts its own part of each run; ranks meet at
``MASTER_PORT`` + the run's number, so as many ports above it must be free. Only the first rank prints and writes. A
failing run ends the series there, since only the launcher can stop the run's other ranks; the same command continues
from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rao.checkpoint.continuing import check_settings
from nemo_rao.checkpoint.run_records import has_results
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import RankFailure, UserError, errors_at, report
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.training.checks import check_run

if TYPE_CHECKING:
    from nemo_rao.training.loading import LoadedData

State = Literal["finished", "failed"]

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 15.0  # in which an interrupted run stops its ranks


@dataclass(frozen=True)
class PlannedRun:
    """One of the runs.

    Attributes:
        name: its ``exp_manager.name``.
        label: what tells it from the others, put before messages; may be empty.
        config: the whole run.
    """

    name: str
    label: str
    config: RunConfig


def check_runs(runs: Sequence[PlannedRun], *, another: str = "exp_manager.name") -> None:
    """Checks every run before any starts: its recipe, and what has changed since it was begun. Nothing is written.

    Args:
        another: the option or key by which results go elsewhere.

    Raises:
        UserError: the first mistake, with the label of its run.
    """
    for run in runs:
        with errors_at(run.label):
            check_run(run.config)
            check_settings(run.config, another=another)


def train_runs(runs: Sequence[PlannedRun]) -> Iterator[State]:
    """Trains checked runs in their order; gives how each ended, as soon as it has.

    Raises:
        UserError: the data or a checkpoint does not fit: the first such run stops all.
        RankFailure: under SLURM or torchrun, a run failed. Elsewhere it is told, and the next run starts.
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
    """Imports what runs are trained with, once for the forks that train them; all of them on one engine.

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
    """Trains a checked run in a child, or what of it is left to train.

    Args:
        number: of the run, by which ranks that are started from outside meet at a port of its own.

    Raises:
        UserError: the data or a checkpoint does not fit.
        RankFailure: the run failed.
    """
    in_child(_train, run.config, number, name=f"run {run.name}")


def finished_runs(
    runs: Sequence[PlannedRun],
    loaded: dict[str, LoadedData] | None = None,
    *,
    another: str = "exp_manager.name",
) -> set[str]:
    """The names of the runs that have reached their end, on the data that their files hold now.

    Reads that data, quietly. To be called in a child: tokenizers that have worked in this process would be slow in the
    forks of it.

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
    """The last value of all that a run has logged; ``step`` is the last one."""
    last: dict[str, float] = {}
    for record in read_metrics(run_dir(config) / "metrics.jsonl"):
        last |= record
    return last


def write_results(path: Path, text: str) -> None:
    """Writes a file of results atomically, once for all ranks."""
    from nemo_rao.runtime.console import is_first_rank

    if is_first_rank():
        write_atomically(path, text)


def print_table(table: Any) -> None:
    """Prints a table of ``rich``, once for all ranks."""
    from rich.console import Console

    from nemo_rao.runtime.console import say

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    with console.capture() as printed:
        console.print(table)
    say(f"\n{printed.get().rstrip()}")


# --------------------------------------------------------------------------------------------------- child processes


def in_child(function: Callable[..., Any], *args: Any, name: str) -> Any:
    """``function(*args)`` in a process of its own; raises the UserError or RankFailure that ended it.

    Args:
        name: what it is, for messages: "run gpt_dpo".
    """
    import torch

    # As for ranks: CUDA does not survive a fork once it is initialised.
    method = "spawn" if torch.cuda.is_available() and torch.cuda.is_initialized() else "fork"
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(function, args, sender, os.getpid()), name=name)
    sys.stdout.flush()
    sys.stderr.flush()
    child.start()
    try:
        sender.close()
        with contextlib.suppress(OSError):  # the child does the same itself; whoever is first
            os.setpgid(child.pid, child.pid)
        kind, result = _outcome(child, receiver)
    except BaseException:
        _stop(child)
        raise
    if kind == "user":
        raise UserError(result)
    if kind == "failure":
        raise RankFailure(result)
    return result


def _call(function: Callable[..., Any], args: Sequence[Any], sender: Connection, parent: int) -> None:
    """What the child does; ends the process."""
    # A group of its own: Ctrl-C reaches the parent alone, which stops the child, which stops its ranks.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed takes the child along
        if os.getppid() != parent:
            os._exit(1)
    outcome: tuple[str, Any]
    try:
        outcome = ("done", function(*args))
    except UserError as error:
        outcome = ("user", str(error))
    except RankFailure as error:
        outcome = ("failure", str(error))
    except BaseException:
        outcome = ("failure", traceback.format_exc())
    # Without interpreter shutdown, which would wait for what a run that failed has left: so that is stopped by hand.
    for left in multiprocessing.active_children():
        left.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(outcome)
    os._exit(0)


def _train(config: RunConfig, number: int) -> None:
    from nemo_rao.training.train import train

    _meet_at_own_port(number)
    train(config)


def _meet_at_own_port(number: int) -> None:
    """Lets ranks that were started from outside meet anew: a rank that is ahead may find the last run's ranks still up.

    torchrun's own store, which it keeps open, would still hold what the last run's ranks told each other there.
    """
    from nemo_rao.runtime.launch import started_externally

    launcher = started_externally()
    if launcher is None:
        return
    # The same on every rank: a job's number tells it from others on the node.
    default = 15000 + int(os.environ["SLURM_JOB_ID"][-4:]) if launcher == "slurm" else 29500
    os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", default)) + number)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _outcome(child: Any, receiver: Connection) -> tuple[str, Any]:
    """Waits for the child's word, or for its end without one."""
    while not receiver.poll(0.2) and child.exitcode is None:
        pass
    try:
        outcome = receiver.recv() if receiver.poll() else None
    except EOFError:
        outcome = None
    child.join()
    if outcome is not None:
        return outcome
    code = child.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        return "failure", f"{child.name} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return "failure", f"{child.name} exited with code {code}"


def _stop(child: Any) -> None:
    """Interrupts a child, which stops its ranks; kills it where it does not end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGINT)
    child.join(_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
