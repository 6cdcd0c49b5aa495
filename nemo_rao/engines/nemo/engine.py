"""The NeMo 2 engine; see :class:`nemo_rao.engines.engine.Engine`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.mcore import cpu
from nemo_rao.runtime.console import quiet_imports

if TYPE_CHECKING:
    from nemo_rao.loop.data import TrainingData
    from nemo_rao.loop.prepared import Prepared
    from nemo_rao.loop.session import Hook, Session
    from nemo_rao.objectives.base import Needs


def load() -> bool:
    with quiet_imports():
        on_cpu = cpu.install_if_needed()
        if on_cpu:
            from nemo_rao.engines.nemo.cpu import patch_nemo

            patch_nemo()
        from nemo_rao.engines.nemo import build  # noqa: F401

        try:
            from nemo.lightning.callback_group import CallbackGroup
        except ModuleNotFoundError:  # before NeMo 2.6
            return on_cpu
    # NeMo's telemetry is enabled if torchrun has set RANK=0, and then fails at the first checkpoint unless NeMo's API
    # has described the run to it. It has no exporter anyway.
    CallbackGroup.get_instance().callbacks.clear()
    return on_cpu


def model_config(config: RunConfig) -> Any:
    from nemo_rao.engines.nemo import build

    return build.model_config(config)


def train_rank(config: RunConfig, prepared: Prepared, data: TrainingData, hooks: list[Hook]) -> None:
    import torch
    from nemo.lightning.resume import AdapterPath

    from nemo_rao.engines.nemo import build
    from nemo_rao.engines.nemo.callbacks import CallHooks, KeepSchedule
    from nemo_rao.engines.nemo.data_module import AlignmentDataModule
    from nemo_rao.engines.nemo.trainer import make_trainer, set_up_rank
    from nemo_rao.loop.loggers import loggers

    set_up_rank(config)
    folder = run_dir(config)
    model = build.model(config, prepared.objective_config, prepared.max_steps)
    trainer = make_trainer(
        config,
        max_steps=prepared.max_steps,
        folder=folder,
        callbacks=[build.checkpoint_callback(config, folder)],
        start_from=prepared.start_from if prepared.resume_from is None else None,
    )
    calls = CallHooks(hooks, folder, loggers(config, folder))
    own: list[Any] = [calls, KeepSchedule()]
    trainer.strategy.save_beside = calls.save
    adapters_only = model.model_transform is not None
    if adapters_only:
        # Adds the adapters after the reference pass, which therefore runs the model without them.
        own.insert(1, model.model_transform)
    # Set after construction: NeMo copies a trainer's arguments and stores them with every checkpoint, and these hold
    # the data. They are first, so that checkpoints see the step's metrics.
    trainer.callbacks[:0] = own
    if prepared.resume_from is not None:
        # Checkpoints of a LoRA run contain only its adapters: the other weights come from the run's start.
        trainer.ckpt_path = (
            AdapterPath(prepared.resume_from, base_model_path=prepared.start_from)
            if adapters_only
            else str(prepared.resume_from)
        )
    trainer.fit(model, AlignmentDataModule(data, seq_length=config.model.seq_length))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def pass_rank(
    config: RunConfig,
    objective_config: Any,
    data: TrainingData,
    checkpoint: Path,
    folder: Path,
    compute: Callable[[Session], None],
) -> None:
    import lightning.pytorch as pl

    from nemo_rao.engines.nemo import build
    from nemo_rao.engines.nemo.callbacks import NemoSession
    from nemo_rao.engines.nemo.data_module import AlignmentDataModule
    from nemo_rao.engines.nemo.trainer import make_trainer, set_up_rank

    class Done(Exception):
        """The pass is complete; there is nothing to train."""

    class Pass(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            compute(NemoSession(trainer, folder))
            raise Done

    set_up_rank(config)
    model = build.model(config, objective_config, max_steps=1)
    trainer = make_trainer(config, max_steps=1, folder=folder, start_from=checkpoint)
    trainer.callbacks[:0] = [Pass()]
    with contextlib.suppress(Done):
        trainer.fit(model, AlignmentDataModule(data, seq_length=config.model.seq_length))


def second_model(config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
    from nemo_rao.engines.nemo import second_model

    return second_model.chunks(config, needs, is_trained=is_trained)
