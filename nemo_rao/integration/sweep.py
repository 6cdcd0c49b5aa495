"""``nemo-rao train --multirun``: the runs of a grid, one after the other, and a table of how each ended.

    overrides with several values, search=dpo -> compose_grid -> plan: a name for each run, all checked
        -> run_sweep: a child process for each run, forked after the one import of NeMo -> rows -> table, .sweep.jsonl

The runs share ``exp_manager.exp_dir`` and so the cache of reference log-probabilities: those that start from the same
weights on the same data share one reference pass. A child of its own keeps Megatron's process groups and random
numbers out of the next run. The same command again goes on where it was stopped: a run that reached its end is not
started again, one that was interrupted resumes.

SLURM (srun) and torchrun: every rank walks the same list and starts its own part of each run; ranks meet at
``MASTER_PORT`` + the run's number, so as many ports above it are to be free. The first rank alone talks and writes. A
run that fails ends the sweep there, since only the launcher can stop the run's other ranks; the same command goes on
from there. Not supported: runs side by side, several values for what all runs share
(:data:`ONE_FOR_ALL`), Hydra's other sweepers, and NeMo-Run, whose own experiments start one task a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemo_rao.errors import RankFailure, UserError, report
from nemo_rao.integration.checks import check_run
from nemo_rao.integration.compose import compose_grid, to_yaml
from nemo_rao.integration.config import RunConfig, objective_names, run_dir
from nemo_rao.integration.metrics_file import read_metrics

# Keys with one value for the whole sweep: where results go, and what the process that starts the runs has set up.
ONE_FOR_ALL = ("exp_manager.exp_dir", "exp_manager.name", "trainer.accelerator")
# Metrics in the table, of those that a run has logged; the .sweep.jsonl has all.
SHOWN = ("val/loss", "loss", "rewards/margins", "rewards/accuracies", "rao/target_error")
MAX_NAME = 120  # characters of a run's name after the sweep's own; folders of checkpoints and logs lie below it

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 15.0  # in which an interrupted run stops its ranks


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: its ``exp_manager.name``.
        overrides: what it sets differently from the others, ``key=value`` each.
        config: the whole run.
    """

    name: str
    overrides: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid.

    Attributes:
        name: ``exp_manager.name`` as it was given; those of the runs begin with it.
        runs: in the order in which they are trained.
    """

    name: str
    runs: tuple[SweepRun, ...]


def plan(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Sweep:
    """Composes and names all runs; reads recipes alone, no data.

    Args:
        config_name, overrides, config_dir: see :func:`nemo_rao.integration.compose.compose_grid`.

    Raises:
        UserError: what is wrong in a run, with its overrides; a key that cannot be swept over; two runs of one name.
    """
    grid = compose_grid(config_name, overrides, config_dir)
    sweep_name = grid[0][1].exp_manager.name
    runs: list[SweepRun] = []
    seen: dict[str, tuple[str, ...]] = {}
    for own, config in grid:
        _check_swept_keys(own, config)
        name = "-".join([sweep_name, *filter(None, [_name_of(own)])])
        for identity in (name, repr(config)):
            if (earlier := seen.setdefault(identity, own)) is not own:
                raise UserError(
                    f"{' '.join(own)}: the run of {' '.join(earlier)} again, or another one of its name, {name}; give "
                    "each value once, and texts that differ in more than punctuation"
                )
        config.exp_manager.name = name
        runs.append(SweepRun(name, own, config))
    return Sweep(sweep_name, tuple(runs))


def check(sweep: Sweep) -> None:
    """Checks every run before any starts, see :func:`nemo_rao.integration.checks.check_run`. Nothing is written.

    Raises:
        UserError: the first mistake, with the overrides of its run.
    """
    for run in sweep.runs:
        try:
            check_run(run.config)
        except UserError as error:
            raise UserError(f"{' '.join(run.overrides)}: {error}" if run.overrides else str(error)) from None


def run_sweep(sweep: Sweep) -> int:
    """Trains the runs of a checked sweep and prints the table.

    Returns:
        the exit code: 0, or 1 where a run failed.

    Raises:
        UserError: the data or a checkpoint does not fit: the first such run stops the sweep.
        RankFailure: under SLURM or torchrun, a run failed.
    """
    from nemo_rao.integration.launch import started_externally
    from nemo_rao.integration.prepare import check_ranks_started, import_nemo, select_device
    from nemo_rao.integration.talk import quiet_third_parties, say

    quiet_third_parties()
    finished = {run.name for run in sweep.runs if _is_finished(run.config)}
    if len(finished) < len(sweep.runs):
        for run in sweep.runs:
            check_ranks_started(run.config)
            select_device(run.config)
        import_nemo()
    rows, failed = [], False
    for number, run in enumerate(sweep.runs, start=1):
        state = "finished"
        say(f"\n[{number}/{len(sweep.runs)}] {run.name}{': finished before' if run.name in finished else ''}")
        if run.name not in finished:
            try:
                _run_in_child(run, number)
            except RankFailure as error:
                if started_externally():
                    raise
                report(RankFailure(f"{run.name}: {error}"))
                state, failed = "failed", True
        rows.append(_row(run, state))
        _write(results_file(sweep), rows)
    _print_table(sweep, rows)
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------ names


def _check_swept_keys(own: Sequence[str], config: RunConfig) -> None:
    """Refuses keys that all runs share, and those that a run's objective does not read: equal runs would be trained."""
    unread = {f"model.{name}" for name in objective_names()} - {f"model.{config.model.objective}"}
    for text in own:
        key = text.partition("=")[0]
        if key in ONE_FOR_ALL:
            raise UserError(f"{text}: {key} is one for all runs of a sweep; give one value")
        if key in unread or key.rpartition(".")[0] in unread:
            raise UserError(
                f"{text}: model.objective={config.model.objective} does not read {key}; sweep over keys of "
                f"model.{config.model.objective}, or choose another recipe"
            )


def _name_of(own: Sequence[str]) -> str:
    """``beta=0.05-lr=1e-07``, fit for a folder; a long text ends in a digest of the whole."""
    keys = [text.partition("=")[0] for text in own]
    values = [re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text.partition("=")[2]).strip("_") for text in own]
    name = "-".join(f"{label}={value}" for label, value in zip(_labels(keys), values, strict=True))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _labels(keys: Sequence[str]) -> list[str]:
    """The keys' last parts; of keys that end alike, the whole."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


# ------------------------------------------------------------------------------------------------- one run, one child


def _is_finished(config: RunConfig) -> bool:
    """Whether the last start of this very recipe reached its end: a run writes its recipe first, its curves last."""
    recipe, curves = run_dir(config) / "recipe.yaml", run_dir(config) / "curves.png"
    return (
        config.exp_manager.resume_if_exists
        and recipe.is_file()
        and curves.is_file()
        and curves.stat().st_mtime_ns >= recipe.stat().st_mtime_ns
        and recipe.read_text() == to_yaml(config)
    )


def _run_in_child(run: SweepRun, number: int) -> None:
    """Trains a run in a process of its own; raises the UserError or RankFailure that ended it."""
    import torch

    # As for ranks: CUDA does not survive a fork once it is initialised.
    method = "spawn" if torch.cuda.is_available() and torch.cuda.is_initialized() else "fork"
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_train, args=(run.config, number, sender, os.getpid()), name=run.name)
    sys.stdout.flush()
    sys.stderr.flush()
    child.start()
    try:
        sender.close()
        with contextlib.suppress(OSError):  # the child does the same itself; whoever is first
            os.setpgid(child.pid, child.pid)
        kind, message = _outcome(child, receiver)
    except BaseException:
        _stop(child)
        raise
    if kind == "user":
        raise UserError(message)
    if kind == "failure":
        raise RankFailure(message)


def _train(config: RunConfig, number: int, sender: Connection, parent: int) -> None:
    """What the child does; ends the process."""
    # A group of its own: Ctrl-C reaches the parent alone, which stops the child, which stops its ranks.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed takes the run along
        if os.getppid() != parent:
            os._exit(1)
    from nemo_rao.integration.train import train

    outcome = ("done", "")
    try:
        _meet_at_own_port(number)
        train(config)
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


def _meet_at_own_port(number: int) -> None:
    """Lets ranks that were started from outside meet anew: a rank that is ahead may find the last run's ranks still up.

    torchrun's own store, which it keeps open, would still hold what the last run's ranks told each other there.
    """
    from nemo_rao.integration.launch import started_externally

    launcher = started_externally()
    if launcher is None:
        return
    if launcher == "slurm":
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        port = SLURMEnvironment(auto_requeue=False).main_port
    else:
        port = int(os.environ.get("MASTER_PORT", "29500"))
    os.environ["MASTER_PORT"] = str(port + number)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _outcome(child: Any, receiver: Connection) -> tuple[str, str]:
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
        return "failure", f"run {child.name} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return "failure", f"run {child.name} exited with code {code}"


def _stop(child: Any) -> None:
    """Interrupts a run, which stops its ranks; kills it where it does not end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGINT)
    child.join(_GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.join()


# ---------------------------------------------------------------------------------------------------------- results


def _row(run: SweepRun, state: str) -> dict[str, Any]:
    """How a run ended: name, overrides, state, and the last value of all that it has logged."""
    last: dict[str, float] = {}
    for record in read_metrics(run_dir(run.config) / "metrics.jsonl"):
        last |= record
    overrides = {key: _read(value) for key, _, value in (text.partition("=") for text in run.overrides)}
    return {"name": run.name, "overrides": overrides, "state": state, **last}


def _read(value: str) -> Any:
    """A number as a number, anything else as it is written."""
    try:
        return float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        return value


def results_file(sweep: Sweep) -> Path:
    """``<exp_dir>/<sweep's name>.sweep.jsonl``: a line a run."""
    return run_dir(sweep.runs[0].config).with_name(f"{sweep.name}.sweep.jsonl")


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from nemo_rao.integration.talk import is_first_rank
    from nemo_rao.integration.train import write_atomically

    if is_first_rank():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _print_table(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from nemo_rao.integration.talk import is_first_rank

    if not is_first_rank():
        return
    keys = list(rows[0]["overrides"])
    shown = [name for name in SHOWN if any(name in row for row in rows)]
    table = Table(title=f"{sweep.name}, {len(rows)} runs", title_justify="left")
    for label in _labels(keys) or ["run"]:
        table.add_column(label)
    for label in ("step", *shown):
        table.add_column(label, justify="right")
    table.add_column("")
    for row in rows:
        own = [f"{value:g}" if isinstance(value, float) else str(value) for value in row["overrides"].values()]
        numbers = [f"{row[name]:.4g}" if name in row else "" for name in ("step", *shown)]
        table.add_row(*(own or [row["name"]]), *numbers, row["state"])
    print(flush=True)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)
    print(f"the same, with all metrics: {results_file(sweep)}", flush=True)
