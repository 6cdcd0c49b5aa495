"""Loggers besides ``metrics.jsonl``: TensorBoard and Weights & Biases, the same on every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_rao.config.run_config import RunConfig
from nemo_rao.runtime.console import is_first_rank


class Logger(Protocol):
    """A destination of metrics."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values after ``step`` optimizer steps."""

    def close(self) -> None:
        """Flush and close: a rank exits without the interpreter's shutdown, which would do it."""


def loggers(config: RunConfig, folder: Path) -> Sequence[Logger]:
    """Return TensorBoard's logger, and that of Weights & Biases if enabled; only on rank 0.

    Args:
        folder: directory of the run.
    """
    if not is_first_rank():
        return []
    made: list[Logger] = [TensorBoard(folder)]
    if config.exp_manager.create_wandb_logger:
        made.append(WeightsAndBiases(config, folder))
    return made


class TensorBoard:
    """Writes event files to ``tensorboard``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to a W&B run, whose step is the number of optimizer steps done."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        import wandb

        keys = dataclasses.asdict(config.exp_manager.wandb_logger_kwargs)
        keys["name"] = keys["name"] or config.exp_manager.name
        self._run: Any = wandb.init(dir=str(folder), **keys)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
