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
    """Set up NeMo and Lightning in a rank before it builds anything; its rank is in the environment."""
    vars(rank_zero_only)["rank"] = global_rank()  # read once, on import, which precedes the fork of ranks
    nemo_logging.setLevel(nemo_logging.WARNING)
    # The only place where NeMo reads the timeout of process groups.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(config.trainer.timeout_minutes * 60)))
    if config.trainer.threads_per_rank is not None or not torch.cuda.is_available():
        # Unless it is set, Lightning replaces PyTorch's number of threads by the cores divided among its processes.
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    torch.manual_seed(config.trainer.seed)


def make_trainer(
    config: RunConfig,
    *,
    max_steps: int,
    folder: Path,
    callbacks: Sequence[Any] = (),
    start_from: Path | None = None,
) -> Any:
    """Create NeMo's trainer over the recipe's ranks.

    Args:
        folder: directory of results.
        callbacks: callbacks that NeMo may copy and store with every checkpoint, so none that holds data.
        start_from: checkpoint whose weights are loaded before the first step.
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
        # By default NeMo and Lightning log some numbers under a different step count.
        logger=False,
        log_every_n_steps=0,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # validation is a callback that evaluates every prompt once, for any number of ranks
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
