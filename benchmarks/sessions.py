"""Training runs that pause between steps, so that several take turns: A B C A B C ..., one at a time.

Each run is a separate process that waits for a request to take its next round of steps. A temporary slowdown of the
machine therefore affects all runs, and a round of one run is compared with the same round of another.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.measure import PeakMemory, clock

_TIMEOUT_SECONDS = 1800.0


class Turn:
    """In a run's process: waits for its turn, and measures time and memory.

    Args:
        steps: number of steps in a round.
    """

    def __init__(self, connection: Connection, steps: int) -> None:
        self._connection, self._steps = connection, steps
        self._memory = PeakMemory()
        self._step, self._round_started, self._cpu_started = 0, 0.0, 0.0
        self.notes: dict[str, Any] = {}

    def begin(self) -> None:
        """Called after imports, before data and model are read: memory is measured from here."""
        self._memory.__enter__()

    def hold(self) -> Any:
        """Wait for :meth:`Session.begin`, before anything is measured, and return its argument."""
        self._connection.send({})
        return self._connection.recv()

    def fail(self, why: str) -> None:
        """Report that the run has failed: the session raises :class:`RunFailed`."""
        self._connection.send({"failed": why})

    def peak_bytes(self) -> int:
        return self._memory.so_far()

    def between_steps(self) -> None:
        """Called at the start of each step."""
        if self._step % self._steps == 0:
            now, cpu = clock(), time.process_time()
            seconds = now - self._round_started if self._step else 0.0
            cpu_seconds = cpu - self._cpu_started if self._step else 0.0
            self._connection.send(
                {
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    "peak_bytes": self.peak_bytes(),
                    "notes": self.notes,
                }
            )
            self._connection.recv()
            self._round_started, self._cpu_started = clock(), time.process_time()
        self._step += 1


class RunFailed(RuntimeError):
    """A run has ended before its session was stopped."""


class Session:
    """A run in a separate process. The constructor returns when the run waits before its first step.

    Args:
        function: called there with a :class:`Turn` and ``args``; trains, calling ``Turn.between_steps``.
        steps: number of steps in a round.
        forked: fork from a server that has imported Megatron once, instead of starting a new interpreter.
        held: the function calls :meth:`Turn.hold` first, and the constructor does not wait for it, so that several
            sessions import at the same time; :meth:`begin` then starts one after the other.
    """

    def __init__(
        self, function: Callable[..., None], args: Sequence[Any], *, steps: int, forked: bool, held: bool = False
    ) -> None:
        context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(function, args, steps, theirs))
        self._process.start()
        theirs.close()
        if not held:
            self.started = self._receive()

    def begin(self, given: Any) -> dict[str, Any]:
        """Let a held run continue to its first step; ``given`` is returned by its :meth:`Turn.hold`."""
        self._receive()
        self._connection.send(given)
        self.started = self._receive()
        return self.started

    def round(self) -> dict[str, Any]:
        """One round: seconds, CPU seconds, peak bytes so far, and the run's notes."""
        self._connection.send("go")
        return self._receive()

    def stop(self) -> None:
        """Stop immediately; its ranks end with it."""
        self._process.kill()
        self._process.join()

    def _receive(self) -> dict[str, Any]:
        if not self._connection.poll(_TIMEOUT_SECONDS):
            raise TimeoutError("a run takes no step")
        try:
            received: dict[str, Any] = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RunFailed(f"a run has ended with exit code {self._process.exitcode}") from None
        if "failed" in received:
            raise RunFailed(received["failed"])
        return received


def _run(function: Callable[..., None], args: Sequence[Any], steps: int, connection: Connection) -> None:
    function(Turn(connection, steps), *args)
    os._exit(1)  # it should not have ended


def in_child(function: Callable[..., None], *args: Any) -> None:
    """Run ``function(*args)`` in a fork of the server that has imported Megatron; it must exit with code 0."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")


def prepare_server() -> None:
    """Call this first: the fork server then imports Megatron and NeMo once, and starts no threads."""
    # Threads of an OpenMP or tokenizer pool do not survive a fork, and code that waits for them hangs.
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"})
    multiprocessing.get_context("forkserver").set_forkserver_preload(["benchmarks.preload"])


def in_turn(
    sessions: dict[str, Session], *, repeats: int, minutes: float = math.inf, warm_up: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Name -> its rounds, without warm-up rounds. All sessions are stopped at the end.

    Args:
        minutes: after this time, no further round starts if at least one has been measured.
    """
    end = time.monotonic() + 60 * minutes
    try:
        rounds = []
        for number in range(warm_up + repeats):
            if number > warm_up and time.monotonic() > end:
                break
            rounds.append({name: session.round() for name, session in sessions.items()})
            print(f"{time.strftime('%X')} round {number + 1} of {warm_up + repeats}", flush=True)
    finally:
        for session in sessions.values():
            session.stop()
    return {name: [one[name] for one in rounds[warm_up:]] for name in sessions}
