"""Detection of usable GPUs, and of whether Transformer Engine runs on them.

Every choice between Transformer Engine's layers and this project's follows :func:`transformer_engine_is_used`. Whether
the package can be imported is not sufficient: it also imports without a GPU, as in a container on a login node, and
then fails in its first kernel.
"""

from __future__ import annotations

import importlib.util
import os

CPU_NOTICE = "no CUDA device, Megatron runs on the CPU (local layer spec, gloo)"


def has_gpu() -> bool:
    """Whether PyTorch can use a CUDA device, without initializing CUDA, which would not survive a fork.

    ``False`` once :func:`nemo_rao.mcore.cpu.install_if_needed` has put Megatron on the CPU.
    """
    # Asks the driver's management library. The default check starts the CUDA driver in this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def transformer_engine_is_used(accelerator: str = "auto") -> bool:
    """Whether a run uses Transformer Engine's layers: it is installed, and the run is on a GPU.

    Args:
        accelerator: ``trainer.accelerator``. ``"gpu"`` is trusted, as jobs are checked on machines that may lack GPUs;
            ``"auto"`` means a GPU of this machine.
    """
    if accelerator == "cpu" or importlib.util.find_spec("transformer_engine") is None:
        return False
    return accelerator == "gpu" or has_gpu()
