"""NeMo's trainer as a :class:`~nemo_rao.loop.session.Session`, and the callback that calls the hooks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_rao.batch import MicroBatch
from nemo_rao.loop.data import TrainingData
from nemo_rao.loop.loggers import Logger
from nemo_rao.loop.reference import ReferencePass
from nemo_rao.loop.session import Hook
from nemo_rao.mcore.forward import unwrapped
from nemo_rao.mcore.objective_loss import ObjectiveLoss


def model_chunks(trainer: pl.Trainer) -> list[Any]:
    """Return this rank's model chunks, as Megatron's schedules expect them."""
    pipeline = trainer.strategy.megatron_parallel.pipeline
    return pipeline if isinstance(pipeline, list) else [pipeline]


class NemoSession:
    """See :class:`nemo_rao.loop.session.Session`.

    Args:
        trainer: NeMo's trainer, with a model and a data module of this project attached.
        folder: directory of the run.
        loggers: loggers of the run.
    """

    def __init__(self, trainer: pl.Trainer, folder: Path, loggers: Sequence[Logger] = ()) -> None:
        self._trainer: Any = trainer
        self._folder = folder
        self._loggers = loggers
        for chunk in self.chunks:  # in an interleaved pipeline, NeMo rebuilds each chunk
            chunk.loss = self.loss
        self._logged_step = -1
        self._logged: set[str] = set()  # names in callback_metrics of that step

    @property
    def chunks(self) -> Sequence[Any]:
        return model_chunks(self._trainer)

    @property
    def step(self) -> int:
        return int(self._trainer.global_step)

    @property
    def max_steps(self) -> int:
        return int(self._trainer.max_steps)

    @property
    def is_first_rank(self) -> bool:
        return bool(self._trainer.is_global_zero)

    @property
    def is_stopping(self) -> bool:
        return bool(self._trainer.should_stop)

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def data(self) -> TrainingData:
        return self._trainer.datamodule.data  # type: ignore[no-any-return]

    @property
    def loss(self) -> ObjectiveLoss:
        return self._trainer.lightning_module.loss  # type: ignore[no-any-return]

    @property
    def loggers(self) -> Sequence[Logger]:
        return self._loggers

    def reported(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self._trainer.callback_metrics.items()}

    def report(self, values: Mapping[str, float]) -> None:
        # Not by log_dict, which takes about a millisecond per number. The checkpoints' monitor and the progress bar
        # read callback_metrics, which must not contain metrics of earlier steps.
        metrics = self._trainer.callback_metrics
        if self.step != self._logged_step:
            for name in self._logged:
                metrics.pop(name, None)
            self._logged_step, self._logged = self.step, set()
        metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self._logged.update(values)

    def stop(self) -> None:
        self._trainer.should_stop = True

    def save(self) -> None:
        for callback in self._trainer.checkpoint_callbacks:
            callback.save_last_now(self._trainer)

    def sharded_weights(self) -> Mapping[str, Any]:
        return self._trainer.strategy.megatron_parallel.sharded_state_dict()  # type: ignore[no-any-return]


class CallHooks(pl.Callback):
    """Calls a run's hooks, in order. Must be the first callback, so that checkpoints see a step's metrics.

    Args:
        hooks: hooks of :mod:`nemo_rao.loop`.
        folder: directory of the run.
        loggers: loggers of the run.
    """

    # Key of the reference pass's state in checkpoints; unchanged, so that earlier ones can be resumed.
    state_key = "ReferencePass"

    def __init__(self, hooks: Sequence[Hook], folder: Path, loggers: Sequence[Logger]) -> None:
        self._hooks = hooks
        self._folder = folder
        self._loggers = loggers
        self._references = [hook for hook in hooks if isinstance(hook, ReferencePass)]
        self._session: NemoSession | None = None

    @property
    def session(self) -> NemoSession:
        assert self._session is not None, "the session exists once the run has started"
        return self._session

    def state_dict(self) -> dict[str, Any]:
        return {name: value for hook in self._references for name, value in hook.state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for hook in self._references:
            hook.state = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._session = NemoSession(trainer, self._folder, self._loggers)
        for hook in self._hooks:
            hook.start(self._session)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.before_step(self.session)

    def on_megatron_microbatch_start(self, step: Any, batch: MicroBatch, forward_callback: Any) -> None:
        embeds_tokens = unwrapped(forward_callback.model).pre_process
        for hook in self._hooks:
            hook.micro_batch(self.session, batch, embeds_tokens=embeds_tokens)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.after_step(self.session)

    def save(self, folder: Path) -> None:
        """Let the hooks write their parts of a checkpoint."""
        for hook in self._hooks:
            hook.save(self.session, folder)

    def on_train_end(self, *args: Any) -> None:
        for hook in self._hooks:
            hook.end(self.session)

    def on_fit_end(self, *args: Any) -> None:
        for hook in self._hooks:
            hook.close()
        for logger in self._loggers:
            logger.close()


class KeepSchedule(pl.Callback):
    """Sets learning rate and optimizer settings from the recipe, also on resume: a run may be extended, or changed.

    A checkpoint restores all attributes of the scheduler, including the length of the run, and the optimizer's
    hyperparameters; beyond that length the learning rate would silently stay at its minimum. Only the number of
    completed steps is taken from the checkpoint.
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
            scheduler._get_lr_called_within_step = True  # avoids a warning meant for other callers
            scheduler._last_lr = scheduler.get_lr()
            scheduler._get_lr_called_within_step = False
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate
