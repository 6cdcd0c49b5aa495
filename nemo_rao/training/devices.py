"""Ranks and devices of a run, selected before Megatron is imported."""

from __future__ import annotations

import os

from nemo_rao.config.derived import world_size
from nemo_rao.config.precision_checks import FP8, check_gpus_present
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import has_gpu
from nemo_rao.runtime.launch import started_externally


def check_ranks_started(config: RunConfig) -> None:
    """Check that SLURM or torchrun started the ranks that the recipe asks for.

    Raises:
        UserError: they are missing or their number differs.
    """
    launcher, ranks = started_externally(), world_size(config)
    if launcher is None:
        if config.trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={config.trainer.num_nodes}: the other nodes were not started. Use srun (one task "
                "per device) or torchrun."
            )
        return
    started = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"])
    if started != ranks:
        raise UserError(
            f"trainer.devices={config.trainer.devices} x trainer.num_nodes={config.trainer.num_nodes}: are {ranks} "
            f"ranks, but {launcher} started {started}. Make them equal."
        )


def select_device(config: RunConfig) -> None:
    """Decide which device Megatron runs on, before it is imported.

    Raises:
        UserError: GPUs are required and there are none.
    """
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not has_gpu():
        if config.trainer.accelerator == "gpu":
            raise UserError("trainer.accelerator=gpu: this machine has no CUDA device. Set it to cpu.")
        if config.precision.fp8 is not None and not config.precision.fp8_simulation:
            raise UserError(
                f"{FP8}={config.precision.fp8}: this machine has no CUDA device, and CPUs do not support FP8. Set "
                "precision=bf16_mixed, or precision.fp8_simulation=true to study the accuracy."
            )
        # Forking after torch has started its threads can hang the children.
        torch.set_num_threads(1)
    elif config.trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}: this machine has {torch.cuda.device_count()} CUDA devices. "
            "Lower it, or set trainer.accelerator=cpu."
        )
    else:
        check_gpus_present(config)
