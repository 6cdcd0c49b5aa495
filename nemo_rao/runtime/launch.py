"""Starts the ranks of a run: forked here, or already started by SLURM or torchrun.

Forked ranks share what the parent has imported and read: four ranks pay for one import and one tokenisation. A rank
that fails takes the others down at once, and its own traceback is shown, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from nemo_rao.errors import RankFailure, UserError

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_PORTS = (10_000, 20_000)  # below those that Linux gives out, and apart from those of SLURM's jobs
_POLL_SECONDS = 0.5  # in which the end of a rank is noticed at the latest

_Report = tuple[float, str, str]  # when; "user", "said" (a RankFailure's own words) or "failure"; message


def started_externally(environ: Mapping[str, str] = os.environ) -> str | None:
    """``"slurm"`` in a task of an srun step, ``"torchrun"`` where a launcher set the ranks, else ``None``.

    A shell inside a SLURM allocation is neither: there the ranks are started like on any machine.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ and "MASTER_ADDR" in environ:
        return "torchrun"
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    return None


def launch(
    function: Callable[..., None],
    args: Sequence[Any],
    *,
    num_ranks: int,
    num_nodes: int = 1,
    in_children: bool = False,
) -> None:
    """Run ``function(*args)`` on every rank and return when all are done.

    Args:
        function: what a rank does; finds its place in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
        num_ranks: ranks on this machine.
        num_nodes: machines; more than one only under SLURM or torchrun.
        in_children: a single rank, too, is a process of its own, which leaves this one as it was.

    Raises:
        UserError: several nodes without a launcher that starts them; or a rank raised it.
        RankFailure: a rank failed.
    """
    if started_externally():
        function(*args)
        return
    if num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes is {num_nodes}, but nothing started the other nodes: use srun (one task a device) or "
            "torchrun"
        )
    if num_ranks == 1 and not in_children:
        mine = _rank_environment(0, 1, _free_port())
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            function(*args)
        finally:  # the next run of this process is not to be taken for a rank that torchrun started
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return
    _launch_local(function, args, num_ranks)


def _launch_local(function: Callable[..., None], args: Sequence[Any], num_ranks: int) -> None:
    # CUDA does not survive a fork once it is initialised, which some imports do.
    method = "spawn" if torch.cuda.is_available() and torch.cuda.is_initialized() else "fork"
    context: Any = multiprocessing.get_context(method)
    port = _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    processes: list[Any] = []
    reports: list[Connection] = []
    try:
        for rank in range(num_ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(function, args, rank, num_ranks, port, sender, os.getpid()), name=f"rank {rank}"
            )
            process.start()
            with contextlib.suppress(OSError):  # the rank does the same itself; whoever is first
                os.setpgid(process.pid, process.pid)
            sender.close()
            processes.append(process)
            reports.append(receiver)
        _wait_for_all(processes, reports)
    except BaseException:
        _stop(processes)
        raise


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _free_port() -> int:
    """A port on which nobody listens, of those that systems do not give out by themselves.

    Rank 0 listens there a moment later. One from the system's own range could be given to another process before.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port
    raise RankFailure(f"no free port in {_PORTS[0]} to {_PORTS[1] - 1} for ranks to meet at")


def _run_rank(
    function: Callable[..., None],
    args: Sequence[Any],
    rank: int,
    num_ranks: int,
    port: int,
    report: Connection,
    parent: int,
) -> None:
    # A group of its own, by which what a rank has started is stopped with it.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        # A parent that is killed takes its ranks along.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the ranks
    os.environ.update(_rank_environment(rank, num_ranks, port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    try:
        function(*args)
    except UserError as error:
        report.send((time.monotonic(), "user", str(error)))
        _exit(2)
    except RankFailure as error:  # says what happened by itself
        report.send((time.monotonic(), "said", str(error)))
        _exit(1)
    except BaseException:
        report.send((time.monotonic(), "failure", traceback.format_exc()))
        _exit(1)
    _exit(0)


def _exit(code: int) -> None:
    # Without interpreter shutdown: a rank that failed in a collective would wait there for the others. So what it has
    # started itself, such as the server of a checkpoint writer's queue, is to be stopped by hand.
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for_all(processes: Sequence[Any], reports: Sequence[Connection]) -> None:
    running = set(range(len(processes)))
    silent = dict(enumerate(reports))
    said: dict[int, _Report] = {}
    while running:
        # Not without a limit: a sentinel is a pipe, which what a rank has started can hold open after the rank's end.
        wait([*(processes[rank].sentinel for rank in running), *silent.values()], timeout=_POLL_SECONDS)
        _receive(silent, said)
        ended = {rank for rank in running if processes[rank].exitcode is not None}
        running -= ended
        if any(processes[rank].exitcode != 0 for rank in ended):
            time.sleep(0.3)  # a rank killed by a signal says nothing itself: see whether there is one
            _receive(silent, said)
            raise _failure(processes, said)


def _receive(silent: dict[int, Connection], said: dict[int, _Report]) -> None:
    """Read what ranks say while they say it: a pipe holds less than a long traceback, and its writer waits."""
    for rank, report in list(silent.items()):
        if report.poll():
            with contextlib.suppress(EOFError, OSError):  # a rank that ended without a word
                said[rank] = report.recv()
            del silent[rank]


def _failure(processes: Sequence[Any], said: Mapping[int, _Report]) -> Exception:
    codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    killed = {rank: signal.Signals(-code).name for rank, code in codes.items() if code < 0}
    for rank, name in killed.items():
        # An abort can be a consequence: NCCL's watchdog ends a rank that way when its peer is gone.
        if name != "SIGABRT":
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return RankFailure(f"rank {rank} was killed by {name}{hint}")
    by_time = sorted((when, rank, kind, message) for rank, (when, kind, message) in said.items())
    for _, _, kind, message in by_time:
        if kind != "failure":
            return UserError(message) if kind == "user" else RankFailure(message)
    ends = [f"rank {rank} was killed by {name}" for rank, name in killed.items()]
    if by_time:  # the others failed because this one was gone
        _, rank, _, message = by_time[0]
        return RankFailure("\n".join([f"rank {rank} failed:", message, *ends]))
    ends += [f"rank {rank} exited with code {code}" for rank, code in codes.items() if code > 0]
    return RankFailure(ends[0])


def _stop(processes: Sequence[Any]) -> None:
    """End the ranks and what they have started."""
    _signal_groups(processes, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(process.exitcode is None for process in processes):
        time.sleep(0.05)
    _signal_groups(processes, signal.SIGKILL)
    for process in processes:
        process.join()


def _signal_groups(processes: Sequence[Any], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
            os.killpg(process.pid, number)
