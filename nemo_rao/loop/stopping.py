"""In a job of ``nemo-rao launch``: stop a run between two steps when requested, and end it if it hangs.

NeMo's PreemptionCallback was considered: it listens to one signal on rank 0 only, and leaves nothing by which an
interrupted job differs from a finished one. Lightning's requeueing saves checkpoints that are not Megatron's.
"""

from __future__ import annotations

import os

import torch

from nemo_rao.loop.session import Hook, Session
from nemo_rao.runtime.job import HANG_SECONDS, REQUEST, Watchdog, job_folder


class StopWhenAsked(Hook):
    """Agrees at the end of each step whether any rank was asked to stop; then the last checkpoint is saved.

    The engine saves it, as at the end of a run. Does nothing outside of a job. Must be the first hook, so that what
    others do before the first step is watched, too.
    """

    def __init__(self) -> None:
        self._in_job = job_folder() is not None
        self._watchdog = Watchdog(float(os.environ[HANG_SECONDS])) if HANG_SECONDS in os.environ else None

    def start(self, session: Session) -> None:
        if self._in_job:
            REQUEST.listen()  # again: an engine may have installed a handler that raises within a step
        if self._watchdog is not None:
            watchdog = self._watchdog
            for chunk in session.chunks:
                chunk.register_forward_pre_hook(lambda *_: watchdog.moved(f"a micro-batch after step {session.step}"))
            watchdog.start()

    def before_step(self, session: Session) -> None:
        REQUEST.heard_at_steps = True

    def after_step(self, session: Session) -> None:
        if self._watchdog is not None:
            self._watchdog.moved(f"step {session.step}")
        REQUEST.stepped = True
        if not self._in_job:
            return
        asked = torch.tensor(int(REQUEST.asked), device="cuda" if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item() and session.step < session.max_steps:  # otherwise the run ends anyway
            REQUEST.stopped_at = session.step
            session.stop()

    def end(self, session: Session) -> None:
        if self._watchdog is not None:
            self._watchdog.moved("the last step")

    def close(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
