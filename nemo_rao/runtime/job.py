"""A rank inside a job that ``nemo-rao launch`` submitted: signals from the job, and records for it.

The batch script (:mod:`nemo_rao.cluster.script`) names a directory of records in :data:`FOLDER`, one per job:

    rank-N.log   output of rank N                         stopped   the run was asked to stop, and has saved
    failure      message of the first rank that failed

Exit codes are not sufficient: srun ends the other ranks once one has failed, and then returns a code of its choice.
Without the variable this module does nothing. It imports only the standard library, so that signals are handled before
anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nemo_rao.errors import RankFailure, UserError, report

FOLDER = "NEMO_RAO_JOB_FOLDER"
HANG_SECONDS = "NEMO_RAO_HANG_SECONDS"
STOPPED, FAILURE = "stopped", "failure"
SIGNAL_SECONDS = 2.0  # time for a signal to reach all ranks


@dataclass
class StopRequest:
    """Whether this rank was asked to stop; signals may arrive several times.

    Attributes:
        asked: a signal has arrived.
        heard_at_steps: steps are running, and the request is handled at the end of the next one; before that, there is
            nothing new to save, and the rank exits at once.
        stepped: a step of this attempt is complete, so every rank handles requests at steps. Before, a rank may have
            exited at once, and others miss it within a step.
        stopped_at: the step at which all ranks have agreed to stop.
    """

    asked: bool = False
    heard_at_steps: bool = False
    stepped: bool = False
    stopped_at: int | None = None

    def hear(self, number: int = signal.SIGUSR1, frame: FrameType | None = None) -> None:
        self.asked = True
        if not self.heard_at_steps:
            leave_stopped("stopped before the first step of this attempt")

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.hear)


REQUEST = StopRequest()


def job_folder() -> Path | None:
    """Return the directory of this job's records; ``None`` outside of such a job."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


def rank_name() -> str:
    return f"rank {os.environ.get('SLURM_PROCID', '0')} on {socket.gethostname()}"


@contextlib.contextmanager
def supervised() -> Iterator[None]:
    """Handle signals, and record the failure that ends a rank, for the whole life of the rank."""
    if job_folder() is None:
        yield
        return
    REQUEST.listen()
    try:
        yield
    except UserError as error:
        note_failure(f"{rank_name()}: error: {error}")
        _leave(report(error))
    except RankFailure as error:
        _leave_if_others_have()
        note_failure(f"{rank_name()}: {error}")
        _leave(report(error))
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        _leave_if_others_have()
        note_failure(f"{rank_name()} failed:\n{text}")
        _leave(1)


def _leave_if_others_have() -> None:
    """Attribute a failure within the first step to a rank that has exited, if all were asked to stop.

    Nothing is lost: a failure of this rank itself recurs in the next attempt.
    """
    if REQUEST.stepped:
        return
    deadline = time.monotonic() + SIGNAL_SECONDS
    while not REQUEST.asked and time.monotonic() < deadline:
        time.sleep(0.05)
    if REQUEST.asked:
        leave_stopped("stopped within the first step of this attempt")


def note_failure(text: str) -> None:
    """Record the message for the batch script, unless another rank has: the first failure is the cause."""
    folder = job_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        file = os.open(folder / FAILURE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(file, (text.rstrip() + "\n").encode())
        os.close(file)


def leave_if_stopped() -> None:
    """End this rank if the run has stopped and saved, before it counts as finished."""
    if REQUEST.stopped_at is not None:
        leave_stopped(f"saved after step {REQUEST.stopped_at}")


def leave_stopped(text: str) -> NoReturn:
    """End this rank with a message for the batch script.

    The exit code is 0: when a rank fails, srun signals the others, too, and returns another code. The batch script thus
    distinguishes a stopped job from a failed one.
    """
    folder = job_folder()
    assert folder is not None, "signals are handled only in a job"
    if os.environ.get("SLURM_PROCID", "0") == "0":
        (folder / STOPPED).write_text(text + "\n")
    _leave(0)


def _leave(code: int) -> NoReturn:
    # Without interpreter shutdown, which can wait for ranks that have exited.
    with contextlib.suppress(Exception):  # a signal may have interrupted a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Watchdog:
    """Ends this rank, and so the job, if there is no progress for too long, with a message and all threads' stacks.

    Args:
        seconds: maximum time between two calls of :meth:`moved`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._last, self._what = time.monotonic(), "the start"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.moved("the start")
        self._thread.start()

    def moved(self, what: str) -> None:
        """Report progress; ``what`` was completed, for the message."""
        self._last, self._what = time.monotonic(), what

    def stop(self) -> None:
        self._seconds = float("inf")

    def _watch(self) -> None:
        while True:
            time.sleep(min(self._seconds / 4, 10.0))
            idle = time.monotonic() - self._last
            if idle <= self._seconds:
                continue
            line = (
                f"{rank_name()} hangs: no progress for {idle:.0f} seconds (cluster.hang_minutes) since {self._what}; "
                "stacks of the ranks are at the end of their logs"
            )
            print(f"error: {line}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            note_failure(line)
            _leave(1)
