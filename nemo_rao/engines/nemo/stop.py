"""In a job of ``nemo-rao launch``: stops a run between two steps when it is asked to, and ends it when it hangs.

NeMo's PreemptionCallback was considered: it hears one signal on rank 0 alone, and leaves without a trace by which a
job could be told from a finished one. Lightning's requeueing saves checkpoints that are not Megatron's.
"""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_rao.runtime.job import HANG_SECONDS, REQUEST, Watchdog, job_folder


class StopWhenAsked(pl.Callback):
    """All ranks agree at the end of each step whether one of them was asked to stop; the last checkpoint is then saved.

    The saving is :class:`nemo_rao.engines.nemo.build.StepCheckpoint`'s, as at the end of a run. Does nothing outside of
    a job. The first of the callbacks: what others do before the first step is watched, too.
    """

    def __init__(self) -> None:
        self._in_job = job_folder() is not None
        self._watchdog = Watchdog(float(os.environ[HANG_SECONDS])) if HANG_SECONDS in os.environ else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._in_job:
            REQUEST.listen()  # again: Lightning has put a handler of its own there, which raises within a step
        if self._watchdog is not None:
            watchdog = self._watchdog
            pipeline = trainer.strategy.megatron_parallel.pipeline
            for chunk in pipeline if isinstance(pipeline, list) else [pipeline]:
                chunk.register_forward_pre_hook(
                    lambda *_: watchdog.moved(f"a micro-batch after step {trainer.global_step}")
                )
            watchdog.start()

    def on_train_batch_start(self, *args: Any) -> None:
        REQUEST.heard_at_steps = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.moved(f"step {trainer.global_step}")
        REQUEST.stepped = True
        if not self._in_job:
            return
        asked = torch.tensor(int(REQUEST.asked), device=pl_module.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked.item() and trainer.global_step < trainer.max_steps:  # else this was the last step anyway
            REQUEST.stopped_at = trainer.global_step
            trainer.should_stop = True

    def on_train_end(self, *args: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.moved("the last step")

    def on_fit_end(self, *args: Any) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
