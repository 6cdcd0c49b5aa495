"""What happens around NeMo's training steps: random numbers, schedule, scales, mismatched rows, progress.

Further callbacks: :mod:`nemo_rao.engines.nemo.reference_pass`, :mod:`nemo_rao.engines.nemo.step_metrics`,
:mod:`nemo_rao.engines.nemo.stop`, :mod:`nemo_rao.engines.nemo.kept_checkpoints`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_rao.mcore.calibration import calibrate
from nemo_rao.mcore.mismatched import mean_log_ratio
from nemo_rao.mcore.seeds import seed_step
from nemo_rao.runtime.progress import Progress


def model_chunks(trainer: pl.Trainer) -> list[Any]:
    """This rank's model chunks, as Megatron's schedules take them."""
    pipeline = trainer.strategy.megatron_parallel.pipeline
    return pipeline if isinstance(pipeline, list) else [pipeline]


class SeedEveryStep(pl.Callback):
    """Random numbers of each step, see :mod:`nemo_rao.mcore.seeds`.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        seed_step(self._seed, trainer.global_step)


class KeepSchedule(pl.Callback):
    """Learning rate and optimizer settings follow the recipe, also on resume: a run may be made longer, or changed.

    A checkpoint restores the scheduler's every attribute, the length of the run included, and the optimizer's
    hyperparameters; past that length the learning rate would stay at its minimum without a word. Only the number of
    steps done is the checkpoint's.
    """

    _OF_CHECKPOINT = ("last_epoch", "_step_count", "_last_lr", "base_lrs", "optimizer")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        for optimizer, groups in zip(strategy.optimizers, strategy.of_recipe, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            throwaway = torch.optim.SGD([torch.zeros(1)], lr=scheduler.base_lrs[0])
            of_recipe = pl_module.optim.lr_scheduler.scheduler(pl_module, throwaway)["lr_scheduler"]["scheduler"]
            vars(scheduler).update(
                {name: value for name, value in vars(of_recipe).items() if name not in self._OF_CHECKPOINT}
            )
            scheduler._get_lr_called_within_step = True  # spares a warning meant for other callers
            scheduler._last_lr = scheduler.get_lr()
            scheduler._get_lr_called_within_step = False
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate


class CalibrateScales(pl.Callback):
    """Before anything is computed, scales for delayed scaling (:mod:`nemo_rao.mcore.calibration`).

    A checkpoint carries them with the model: a resumed run has none to set.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            module = trainer.datamodule
            calibrate(model_chunks(trainer), module.micro_batches_of_step(0), make_micro_batch=module.train.micro_batch)


class RecordStart(pl.Callback):
    """Lets rank 0 record what the run is, before the first step of this start and after all that may refuse it."""

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._record()


class MismatchedPass(pl.Callback):
    """Before each step, the mean log-ratio of the step's prompts with responses to others, for the loss to use."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        module = trainer.datamodule
        mismatched = module.train.mismatched
        chunks = model_chunks(trainer)
        log_ratio = mean_log_ratio(
            chunks,
            module.micro_batches_of_step(trainer.global_step),
            make_micro_batch=mismatched.micro_batch,
            vocab_size=pl_module.vocab_size,
            log_ratios=chunks[0].log_ratios,
        )
        for chunk in chunks:
            chunk.mismatched_log_ratio = log_ratio


class ShowProgress(pl.Callback):
    """Shows steps on rank 0, with metrics that are already reduced: no rank takes part in a collective alone."""

    shown = ("loss", "rao/target_error", "rewards/margins", "rewards/accuracies", "tokens_per_second")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress = Progress(
            pl_module.objective.name,
            unit="step",
            total=trainer.max_steps,
            done=trainer.global_step,
            shown=trainer.is_global_zero,
        ).__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        of_step = trainer.callback_metrics
        metrics = {name: float(of_step[name]) for name in self.shown if name in of_step}
        self._progress.update(trainer.global_step, metrics=metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.__exit__(None, None, None)
