"""A child process in a separate process group: what it returned or raised, and what its exit code means.

The group is how whatever the child has started is ended with it, and keeps Ctrl-C away from the child: the parent ends
it. A parent that is killed takes the child along.

(Considered: ``torch.multiprocessing.spawn`` and torchelastic. The former imports everything anew in each child, and
neither ends what a child has started.)
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

from nemo_rao.errors import RankFailure, UserError

_PR_SET_PDEATHSIG = 1


class Outcome(NamedTuple):
    """What a child reports before it exits.

    Attributes:
        time: :func:`time.monotonic` of its end, to find the first of several failures.
        kind: ``"done"``; ``"user"``, a :class:`UserError`; ``"failure"``, a :class:`RankFailure`, whose message is
            sufficient; ``"crash"``, any other exception.
        value: what the function returned; the message; or the traceback.
    """

    time: float
    kind: Literal["done", "user", "failure", "crash"]
    value: Any


class Child:
    """``function(*args)`` in a process that starts at once.

    It is forked, and shares what the parent has imported and read. After CUDA has been initialized, which does not
    survive a fork, it is spawned.

    Args:
        name: for messages, such as ``rank 3``.
        interruptible: SIGINT raises KeyboardInterrupt in the child, for functions that have children to end
            themselves; otherwise it is ignored.

    Attributes:
        reports: readable when the child has reported, or has ended.
        sentinel: becomes readable at its end. What the child has started can delay that.
    """

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any] = (), *, name: str, interruptible: bool = False
    ) -> None:
        import torch

        method = "spawn" if torch.cuda.is_available() and torch.cuda.is_initialized() else "fork"
        context: Any = multiprocessing.get_context(method)
        self.reports: Connection
        self.reports, sender = context.Pipe(duplex=False)
        self.name = name
        self._process = context.Process(
            target=_run, args=(function, args, sender, os.getpid(), interruptible), name=name
        )
        sys.stdout.flush()
        sys.stderr.flush()
        self._process.start()
        with contextlib.suppress(OSError):  # the child does the same, so that neither has to wait for the other
            os.setpgid(self._process.pid, self._process.pid)
        sender.close()
        self.sentinel: int = self._process.sentinel

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs; 0 after ``"done"``, 2 after ``"user"``, 1 after other reports; -N: signal N."""
        return self._process.exitcode

    @property
    def killed_by(self) -> str | None:
        """The name of the signal that ended it, such as SIGKILL."""
        code = self.exit_code
        return signal.Signals(-code).name if code is not None and code < 0 else None

    def how_it_ended(self) -> str:
        """One line about the end of a child that has reported nothing."""
        if (name := self.killed_by) is not None:
            return f"{self.name} was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        return f"{self.name} exited with code {self.exit_code}"

    def receive(self) -> Outcome | None:
        """Its report, once; ``None`` if it ended without one. Waits for either."""
        try:
            return self.reports.recv()
        except (EOFError, OSError):
            return None

    def wait(self) -> Outcome | None:
        """Wait for its end; its report, or ``None`` if it ended without one."""
        # Not just `receive`: what the child has started can hold the pipe open after the child's end.
        while not self.reports.poll(0.2) and self.exit_code is None:
            pass
        outcome = self.receive() if self.reports.poll() else None
        self._process.join()
        return outcome

    def value_of(self, outcome: Outcome | None) -> Any:
        """What the function returned, given what :meth:`wait` did.

        Raises:
            UserError: the function raised it.
            RankFailure: it failed in another way.
        """
        if outcome is None:
            raise RankFailure(self.how_it_ended())
        if outcome.kind == "user":
            raise UserError(outcome.value)
        if outcome.kind != "done":
            raise RankFailure(outcome.value)
        return outcome.value


def end(children: Sequence[Child], *, grace: float, interrupt: bool = False) -> None:
    """End children and whatever they have started, and wait for their end.

    Args:
        grace: seconds between the request, SIGTERM to the groups, and SIGKILL to what is left of them.
        interrupt: request with SIGINT, and the children alone, not their groups: for children that end their own
            children. In a run, SIGTERM means to save a checkpoint first.
    """
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left
            if interrupt:
                os.kill(child._process.pid, signal.SIGINT)
            else:
                os.killpg(child._process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(child.exit_code is None for child in children):
        time.sleep(0.05)
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child._process.pid, signal.SIGKILL)
    for child in children:
        child._process.join()


def _run(
    function: Callable[..., Any], args: Sequence[Any], sender: Connection, parent: int, interruptible: bool
) -> None:
    """What the child does; ends the process."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler if interruptible else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler that a fork inherits is meant for the parent
    kind: Literal["done", "user", "failure", "crash"] = "done"
    value: Any
    try:
        value = function(*args)
    except UserError as error:
        kind, value = "user", str(error)
    except RankFailure as error:
        kind, value = "failure", str(error)
    except BaseException:
        kind, value = "crash", traceback.format_exc()
    outcome = Outcome(time.monotonic(), kind, value)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(outcome)
    # Exit without shutting the interpreter down: a rank that failed in a collective would wait there for the others.
    # So what it has started itself, such as the server of a checkpoint writer's queue, is ended here.
    for left in multiprocessing.active_children():
        left.terminate()
    os._exit({"done": 0, "user": 2}.get(kind, 1))
