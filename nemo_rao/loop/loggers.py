"""Where a run's numbers go besides ``metrics.jsonl``, on engines without loggers of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.run_config import RunConfig
from nemo_rao.runtime.console import is_first_rank

Logger = Callable[[Mapping[str, float], int], None]  # (values, step)


def loggers(config: RunConfig, folder: Path) -> list[Logger]:
    """TensorBoard's log, and Weights & Biases' where it is asked for; none but on rank 0."""
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
