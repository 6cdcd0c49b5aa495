"""The ranks and devices of a run, before anything of Megatron is imported."""

from __future__ import annotations

import os

from nemo_rao.config.derived import world_size
from nemo_rao.config.precision_checks import FP8, check_gpus_present
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import has_gpu
from nemo_rao.runtime.launch import started_externally


def check_ranks_started(config: RunConfig) -> None:
    """Refuses ranks that SLURM or torchrun did not start, or started in another number.

    Raises:
        UserError: names the launcher and both numbers.
    """
    launcher, ranks = started_externally(), world_size(config)
    if launcher is None:
        if config.trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={config.trainer.num_nodes}, but nothing started the other nodes: use srun (one "
                "task a device) or torchrun"
            )
        return
    started = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"])
    if started != ranks:
        raise UserError(
            f"{launcher} started {started} ranks, but trainer.devices={config.trainer.devices} x "
            f"trainer.num_nodes={config.trainer.num_nodes} are {ranks}; make them equal"
        )


def select_device(config: RunConfig) -> None:
    """Decide what Megatron is to run on, before anything of it is imported.

    Raises:
        UserError: GPUs are asked for and there are none.
    """
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not has_gpu():
        if config.trainer.accelerator == "gpu":
            raise UserError("trainer.accelerator is gpu, but this machine has no CUDA device; set it to cpu")
        if config.precision.fp8 is not None and not config.precision.fp8_simulation:
            raise UserError(
                f"{FP8}={config.precision.fp8}: this machine has no CUDA device, and a CPU no 8-bit products; choose "
                "precision=bf16_mixed, or precision.fp8_simulation=true to study the accuracy"
            )
        # Forking after torch has started threads of its own can hang the children.
        torch.set_num_threads(1)
    elif config.trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "lower it, or set trainer.accelerator=cpu"
        )
    else:
        check_gpus_present(config)
