"""NeMo's trainer over a recipe's ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_utilities.core.rank_zero import rank_zero_only
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import RestoreConfig
from nemo.utils import AppState
from nemo.utils import logging as nemo_logging

from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.nemo import build
from nemo_rao.runtime.console import global_rank
from nemo_rao.runtime.launch import started_externally


def set_up_rank(config: RunConfig) -> None:
    """What of NeMo and Lightning a rank sets before it builds anything; its place is in the environment."""
    vars(rank_zero_only)["rank"] = global_rank()  # read once, at the import, which forked ranks have behind them
    nemo_logging.setLevel(nemo_logging.WARNING)
    # The one place where NeMo reads how long ranks wait for each other.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(config.trainer.timeout_minutes * 60)))
    torch.manual_seed(config.trainer.seed)


def make_trainer(
    config: RunConfig,
    *,
    max_steps: int,
    folder: Path,
    callbacks: Sequence[Any] = (),
    start_from: Path | None = None,
) -> Any:
    """NeMo's trainer over the recipe's ranks.

    Args:
        folder: of results.
        callbacks: what NeMo may copy and store with every checkpoint: nothing that holds data.
        start_from: a checkpoint whose weights are read before the first step.
    """
    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        max_steps=max_steps,
        max_epochs=-1,
        strategy=build.strategy(config),
        plugins=build.precision(config),
        callbacks=list(callbacks),
        # NeMo and Lightning, left to themselves, log some numbers under a count of their own.
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # validation is a callback: it sees every prompt once, however many ranks there are
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accumulate_grad_batches=1,
    )
    trainer.strategy.cluster_environment = (
        SLURMEnvironment(auto_requeue=False) if started_externally() == "slurm" else TorchElasticEnvironment()
    )
    AppState().log_dir = folder
    if start_from is not None:
        trainer.strategy.restore_config = RestoreConfig(path=str(start_from))
    return trainer
