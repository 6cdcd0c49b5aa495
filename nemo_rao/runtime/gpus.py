"""Detection of usable GPUs, and of whether Transformer Engine runs on them.

Every decision between Transformer Engine's layers and this project's own follows :func:`transformer_engine_is_used`.
That the package can be imported decides nothing: it imports without a GPU too, as in a container on a login node, and
then fails in its first kernel.
"""

from __future__ import annotations

import importlib.util
import os

CPU_NOTICE = "no CUDA device, Megatron runs on the CPU (local layer spec, gloo)"


def has_gpu() -> bool:
    """Whether PyTorch can use a CUDA device, found without initializing CUDA, which would not survive a fork.

    ``False`` once :func:`nemo_rao.mcore.cpu.install_if_needed` has put Megatron on the CPU.
    """
    # Asks the driver's management library. The default check starts the CUDA driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def transformer_engine_is_used(accelerator: str = "auto") -> bool:
    """Whether a run's layers are Transformer Engine's: it is installed, and the run is on a GPU.

    Args:
        accelerator: ``trainer.accelerator``. ``"gpu"`` is believed, as a job is checked where it is submitted, which
            need not have a GPU; ``"auto"`` means a GPU of this machine.
    """
    if accelerator == "cpu" or importlib.util.find_spec("transformer_engine") is None:
        return False
    return accelerator == "gpu" or has_gpu()
