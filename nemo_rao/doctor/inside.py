"""Probes that run in the doctor's child processes: import one package as this project uses it, and report facts.

A probe reports a problem by raising. :func:`main` runs one probe and writes its result.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]


def torch_and_gpus() -> Facts:
    """Report the versions that torch was built with, and the GPUs that it finds."""
    import torch
    from torch import distributed

    backends = distributed.is_available()
    nccl = backends and distributed.is_nccl_available()
    found: Facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(torch.backends.cudnn.version()),
        "nccl": ".".join(str(part) for part in torch.cuda.nccl.version()) if nccl else None,
        "gloo": backends and distributed.is_gloo_available(),
        "gpus": [],
        "no_gpu": None,
    }
    if torch.version.cuda is None:
        found["no_gpu"] = f"torch {torch.__version__} is built without CUDA"
        return found
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, an old driver, or no device: torch's message says which
        found["no_gpu"] = one_line(error)
        return found
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": device.name,
                "capability": [device.major, device.minor],
                "memory_bytes": device.total_memory,
                "error": _cannot_compute(index),
            }
        )
    return found


def _cannot_compute(index: int) -> str | None:
    """Return why a GPU cannot compute: no kernels for its architecture, no free memory, a hardware fault."""
    import torch

    try:
        value = (torch.ones(2, device=f"cuda:{index}") + 1).sum().item()
    except Exception as error:  # CUDA errors have many classes
        return one_line(error)
    return None if value == 4 else f"2 + 2 is {value}"


def _cudnn(number: int | None) -> str | None:
    """Format 91301 as 9.13.1; before version 9 three digits follow the major number: 8906 is 8.9.6."""
    if number is None:
        return None
    major = number // 10000 if number >= 90000 else number // 1000
    rest = number - major * (10000 if number >= 90000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def training() -> Facts:
    """Import what a run imports of Megatron, its engine and this project, adapted to this machine as in a run."""
    from nemo_rao.config.engine_choice import installed_engine
    from nemo_rao.training import train  # noqa: F401

    return {"on_cpu": _load_engine(str(installed_engine()))}


def _load_engine(name: str) -> bool:
    """Import an engine as a run does; whether it runs on the CPU."""
    on_cpu: bool = importlib.import_module(f"nemo_rao.engines.{name}.engine").load()
    return on_cpu


def nemo() -> Facts:
    _load_engine("nemo")
    return {}


def bridge() -> Facts:
    _load_engine("bridge")
    return {}


def megatron() -> Facts:
    import megatron.core  # noqa: F401

    return {}


def transformer_engine() -> Facts:
    from transformer_engine.pytorch import Linear  # noqa: F401
    from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: F401

    return {}


def apex() -> Facts:
    import amp_C  # noqa: F401  # its kernels
    from apex.optimizers import FusedAdam  # noqa: F401

    return {}


def nemo_run() -> Facts:
    import nemo_run  # noqa: F401

    return {}


def transformers() -> Facts:
    from safetensors.torch import save_file  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    return {}


def vllm() -> Facts:
    from vllm import LLM, SamplingParams  # noqa: F401

    return {}


def lm_eval() -> Facts:
    from lm_eval.tasks import TaskManager  # noqa: F401

    return {}


def wandb() -> Facts:
    import wandb  # noqa: F401

    return {}


# Name of a probe -> its function, and the top-level package that it tests.
PROBES: dict[str, tuple[Callable[[], Facts], str]] = {
    "torch": (torch_and_gpus, "torch"),
    "training": (training, "megatron"),
    "megatron-core": (megatron, "megatron"),
    "nemo-toolkit": (nemo, "nemo"),
    "megatron-bridge": (bridge, "megatron"),
    "transformer-engine": (transformer_engine, "transformer_engine"),
    "apex": (apex, "apex"),
    "nemo-run": (nemo_run, "nemo_run"),
    "transformers": (transformers, "transformers"),
    "vllm": (vllm, "vllm"),
    "lm-eval": (lm_eval, "lm_eval"),
    "wandb": (wandb, "wandb"),
}


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(name: str) -> None:
    """Run one probe; stdout contains only its result or its error."""
    answer = os.dup(1)
    os.dup2(2, 1)  # packages print while they are imported
    try:
        result: Facts = {"facts": PROBES[name][0]()}
    except Exception as error:  # a broken package can raise anything
        result = {"error": one_line(error)}
    with os.fdopen(answer, "w") as out:
        json.dump(result, out)
    sys.stderr.flush()
    os._exit(0)  # skip exit handlers of packages, which can hang
