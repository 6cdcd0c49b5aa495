"""Where a run's numbers go besides ``metrics.jsonl``; only rank 0 has any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.bridge.session import Logger
from nemo_rao.runtime.console import is_first_rank


def loggers(config: RunConfig, folder: Path) -> list[Logger]:
    """TensorBoard's log, and Weights & Biases' where it is asked for."""
    if not is_first_rank():
        return []
    made = [_tensorboard(folder)]
    if config.exp_manager.create_wandb_logger:
        made.append(_wandb(config, folder))
    return made


def _tensorboard(folder: Path) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(config: RunConfig, folder: Path) -> Logger:
    import wandb

    keys = dataclasses.asdict(config.exp_manager.wandb_logger_kwargs)
    run = wandb.init(dir=str(folder), project=keys["project"], name=keys["name"] or config.exp_manager.name)
    return lambda values, step: run.log(dict(values), step=step)
