"""Start the ranks of a run: fork them here, unless SLURM or torchrun has started them.

Forked ranks share what the parent has imported and read: four ranks pay for one import and one tokenization. A rank
that fails ends the others at once, and its own traceback is shown, once.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from nemo_rao.errors import RankFailure, UserError
from nemo_rao.runtime.child import Child, Outcome, end

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_PORTS = (10_000, 20_000)  # below those that Linux gives out, and apart from those of SLURM's jobs
_POLL_SECONDS = 0.5  # within which the end of a rank is noticed


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
        function: what a rank does; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.
        num_ranks: ranks on this machine.
        num_nodes: machines; more than one only under SLURM or torchrun.
        in_children: run a single rank in a child process, too, which leaves this process unchanged.

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
        finally:  # or the next run of this process would look like a rank that torchrun has started
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return
    _launch_local(function, args, num_ranks)


def _launch_local(function: Callable[..., None], args: Sequence[Any], num_ranks: int) -> None:
    port = _free_port()
    ranks: list[Child] = []
    try:
        for rank in range(num_ranks):
            ranks.append(Child(_run_rank, (function, args, rank, num_ranks, port), name=f"rank {rank}"))
        _wait_for_all(ranks)
    except BaseException:
        end(ranks, grace=_GRACE_SECONDS)
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
    """A free port outside the range from which systems assign ports.

    Rank 0 listens there a moment later. A port of that range could be assigned to another process before.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port
    raise RankFailure(f"no free port in {_PORTS[0]} to {_PORTS[1] - 1} for ranks to meet at")


def _run_rank(function: Callable[..., None], args: Sequence[Any], rank: int, num_ranks: int, port: int) -> None:
    os.environ.update(_rank_environment(rank, num_ranks, port))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    function(*args)


def _wait_for_all(ranks: Sequence[Child]) -> None:
    running = set(range(len(ranks)))
    silent = set(running)
    reported: dict[int, Outcome] = {}
    while running:
        # With a time limit: a sentinel is a pipe, which what a rank has started can hold open after the rank's end.
        sources: list[Any] = [*(ranks[rank].sentinel for rank in running), *(ranks[rank].reports for rank in silent)]
        wait(sources, timeout=_POLL_SECONDS)
        _receive(ranks, silent, reported)
        ended = {rank for rank in running if ranks[rank].exit_code is not None}
        running -= ended
        if any(ranks[rank].exit_code != 0 for rank in ended):
            time.sleep(0.3)  # a rank that was killed reports nothing: another may have failed first, and report it
            _receive(ranks, silent, reported)
            raise _failure(ranks, reported)


def _receive(ranks: Sequence[Child], silent: set[int], reported: dict[int, Outcome]) -> None:
    """Read reports as they are written: a pipe holds less than a long traceback, and its writer waits."""
    for rank in sorted(silent):
        if ranks[rank].reports.poll():
            silent.remove(rank)
            if (outcome := ranks[rank].receive()) is not None:
                reported[rank] = outcome


def _failure(ranks: Sequence[Child], reported: Mapping[int, Outcome]) -> Exception:
    """What to raise: of several failures, the one that is not a consequence of another."""
    killed = [rank for rank in ranks if rank.killed_by is not None]
    for rank in killed:
        # An abort can be a consequence: NCCL's watchdog ends a rank that way when its peer is gone.
        if rank.killed_by != "SIGABRT":
            return RankFailure(rank.how_it_ended())
    failed = sorted((outcome, rank) for rank, outcome in reported.items() if outcome.kind != "done")
    for outcome, _ in failed:
        if outcome.kind != "crash":
            return UserError(outcome.value) if outcome.kind == "user" else RankFailure(outcome.value)
    ends = [rank.how_it_ended() for rank in killed]
    if failed:  # the others failed because this one was gone
        outcome, number = failed[0]
        return RankFailure("\n".join([f"rank {number} failed:", outcome.value, *ends]))
    ends += [rank.how_it_ended() for rank in ranks if (rank.exit_code or 0) > 0]
    return RankFailure(ends[0])
