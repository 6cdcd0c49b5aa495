"""Where a run's numbers go besides ``metrics.jsonl``: TensorBoard and Weights & Biases, the same on every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nemo_rao.config.run_config import RunConfig
from nemo_rao.runtime.console import is_first_rank


class Logger(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take numbers of the optimizer steps done so far."""

    def close(self) -> None:
        """After the last of them: a rank ends without the interpreter's shutdown, which would do it."""


def loggers(config: RunConfig, folder: Path) -> Sequence[Logger]:
    """TensorBoard's log, and Weights & Biases' where it is asked for; none but on rank 0.

    Args:
        folder: of the run.
    """
    if not is_first_rank():
        return []
    made: list[Logger] = [TensorBoard(folder)]
    if config.exp_manager.create_wandb_logger:
        made.append(WeightsAndBiases(config, folder))
    return made


class TensorBoard:
    """Event files in ``tensorboard``."""

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
    """A run of W&B, whose step is the number of optimizer steps done."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        import wandb

        keys = dataclasses.asdict(config.exp_manager.wandb_logger_kwargs)
        keys["name"] = keys["name"] or config.exp_manager.name
        self._run: Any = wandb.init(dir=str(folder), **keys)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
