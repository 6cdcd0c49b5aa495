"""Requirements of FP8 on recipe, network and GPU, checked before anything heavy is imported or submitted."""

from __future__ import annotations

import math
import os
import subprocess
from typing import Any

from nemo_rao.config.derived import parallel_multiple
from nemo_rao.config.gpu_models import FP8_RECIPES, GPUS, Capability
from nemo_rao.config.run_config import PrecisionConfig, RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import transformer_engine_is_used

FP8 = "precision.fp8"


def fp8_multiple(config: RunConfig) -> int:
    """Number that the tokens of a sequence and the channels of a linear layer on each rank must be a multiple of."""
    return FP8_RECIPES[config.precision.fp8_recipe].multiple if config.precision.fp8 is not None else 1


def sequence_multiple(config: RunConfig) -> int:
    """Number of tokens that a sequence's length must be a multiple of, so that every rank's part can be computed."""
    keys = config.model
    parts = keys.context_parallel_size * (keys.tensor_model_parallel_size if keys.sequence_parallel else 1)
    return math.lcm(parallel_multiple(config), fp8_multiple(config) * parts)


def quantization(precision: PrecisionConfig) -> str:
    """A text that is equal for settings with equal numerics; part of the key of cached numbers."""
    if precision.fp8 is None:
        return precision.params
    parts = [precision.params, precision.fp8, precision.fp8_recipe]
    if precision.fp8_recipe == "delayed":
        algorithm, length = precision.fp8_amax_compute_algo, precision.fp8_amax_history_len
        parts += [f"{algorithm} of {length}", f"margin {precision.fp8_margin}"]
    if precision.first_last_layers_bf16:
        ends = (precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16)
        parts.append(f"ends {ends[0]} {ends[1]}")
    if precision.fp8_param_gather:
        parts.append("parameters")
    if precision.fp8_simulation:
        parts.append("simulated")
    return ",".join(parts)


def check_precision(config: RunConfig) -> None:
    """Check the keys of ``precision`` against each other and against the keys that they affect.

    Raises:
        UserError: on the first violated rule.
    """
    keys, model = config.precision, config.model
    for name, given in (
        ("fp8_simulation", keys.fp8_simulation),
        ("fp8_param_gather", keys.fp8_param_gather),
        ("first_last_layers_bf16", keys.first_last_layers_bf16),
    ):
        if given and keys.fp8 is None:
            raise UserError(f"precision.{name}=true requires {FP8}, which is null; set {FP8}=hybrid, or leave this out")
    if keys.fp8 is None:
        return
    recipe = f"precision.fp8_recipe={keys.fp8_recipe}"
    if keys.params != "bf16":
        raise UserError(
            f"{FP8}={keys.fp8} requires precision.params=bf16, not {keys.params}: what is not in FP8 is in bf16; set "
            "that"
        )
    if keys.first_last_layers_bf16 and keys.fp8_recipe == "delayed":
        raise UserError(
            "precision.first_last_layers_bf16=true: Megatron does not support it with precision.fp8_recipe=delayed; "
            "choose tensorwise, blockwise or mxfp8, or set it to false"
        )
    if not keys.fp8_wgrad and keys.fp8_recipe != "delayed":
        raise UserError(f"precision.fp8_wgrad=false requires precision.fp8_recipe=delayed, not {recipe}; leave it out")
    if keys.fp8_recipe == "delayed" and model.peft.scheme != "none":
        raise UserError(
            f"model.peft.scheme={model.peft.scheme}: adapter checkpoints do not contain the base layers' scales, "
            f"which {recipe} needs to resume; choose tensorwise, blockwise or mxfp8"
        )
    if keys.fp8_param_gather and not model.optim.use_distributed_optimizer:
        raise UserError(
            "precision.fp8_param_gather=true requires model.optim.use_distributed_optimizer=true, which gathers weights"
        )
    _check_simulation(config)
    multiple = sequence_multiple(config)
    if model.seq_length % multiple:
        why = " on each rank" if model.sequence_parallel or model.context_parallel_size > 1 else ""
        raise UserError(
            f"model.seq_length={model.seq_length} is not a multiple of {multiple}: {recipe} requires a multiple of "
            f"{fp8_multiple(config)} tokens{why}; set it to {-(-model.seq_length // multiple) * multiple}"
        )


def _check_simulation(config: RunConfig) -> None:
    keys = config.precision
    if not keys.fp8_simulation:
        if config.trainer.accelerator == "cpu":
            raise UserError(
                f"{FP8}={keys.fp8}: CPUs do not support FP8 (trainer.accelerator=cpu); choose "
                "precision=bf16_mixed, or precision.fp8_simulation=true to study its accuracy"
            )
        return
    if transformer_engine_is_used(config.trainer.accelerator):
        raise UserError(
            "precision.fp8_simulation=true: Transformer Engine is installed, and its layers already compute in "
            "FP8; set it to false, or trainer.accelerator=cpu"
        )
    if keys.fp8_param_gather:
        raise UserError("precision.fp8_param_gather=true: a simulation keeps weights in bf16; set it to false")
    if keys.fp8_recipe == "delayed" and config.model.recompute_granularity == "full":
        raise UserError(
            "model.recompute_granularity=full: a simulation of precision.fp8_recipe=delayed would recompute layers "
            "with later scales; set it to null"
        )


def check_fp8_network(
    config: RunConfig,
    *,
    num_layers: int | None,
    hidden_size: int | None,
    ffn_hidden_size: int | None,
    num_attention_heads: int | None,
    kv_channels: int | None,
) -> None:
    """Check that the FP8 recipe supports the size of every rank's part of the linear layers.

    Raises:
        UserError: for the first unsupported size.
    """
    keys = config.precision
    if keys.fp8 is None:
        return
    multiple, tensor = fp8_multiple(config), config.model.tensor_model_parallel_size
    heads = None
    if num_attention_heads is not None and (kv_channels is not None or hidden_size is not None):
        width = kv_channels if kv_channels is not None else (hidden_size or 0) // num_attention_heads
        heads = num_attention_heads * width
    for name, size, ranks in (
        ("hidden_size", hidden_size, 1),
        ("ffn_hidden_size", ffn_hidden_size, tensor),
        ("num_attention_heads x head dimension", heads, tensor),
    ):
        if size is not None and (size // ranks) % multiple:
            over = f" / model.tensor_model_parallel_size={tensor}" if ranks > 1 else ""
            raise UserError(
                f"{FP8}={keys.fp8}: model.arch.{name} = {size}{over} is not a multiple of {multiple}, as "
                f"precision.fp8_recipe={keys.fp8_recipe} requires; change the sizes, or choose precision=bf16_mixed"
            )
    if keys.first_last_layers_bf16 and num_layers is not None:
        start, end = keys.num_layers_at_start_in_bf16, keys.num_layers_at_end_in_bf16
        if start + end >= num_layers:
            raise UserError(
                f"precision.num_layers_at_start_in_bf16={start} + num_layers_at_end_in_bf16={end} leave none of "
                f"{num_layers} layers in FP8; lower them, or choose precision=bf16_mixed"
            )
        most = num_layers // config.model.pipeline_model_parallel_size
        for name, count in (
            ("num_layers_at_start_in_bf16", start),
            ("num_layers_at_end_in_bf16", end),
        ):
            if count > most:
                raise UserError(f"precision.{name}={count} exceeds the {most} layers of a pipeline stage; lower it")


# ---------------------------------------------------------------------------------------------------------- GPUs


def check_named_gpu(config: RunConfig, name: str, option: str) -> None:
    """Refuse an FP8 recipe that a GPU of the table does not support.

    Args:
        name: a key of :data:`nemo_rao.config.gpu_models.GPUS`.
        option: the user's option for it, such as ``cluster.gpu=a100``.

    Raises:
        UserError: the GPU is not in the table, or does not support the recipe.
    """
    if name not in GPUS:
        raise UserError(f"{option}: must be one of {', '.join(GPUS)}; leave it out for other GPUs")
    check_capability(config, GPUS[name].capability, option)


def check_capability(config: RunConfig, capability: Capability, where: str) -> None:
    """Refuse an FP8 recipe that a compute capability, such as ``(9, 0)``, does not support."""
    keys = config.precision
    if keys.fp8 is None or keys.fp8_simulation or FP8_RECIPES[keys.fp8_recipe].runs_on(capability):
        return
    recipe = FP8_RECIPES[keys.fp8_recipe]
    others = [name for name, other in FP8_RECIPES.items() if other.runs_on(capability)]
    remedy = f"precision.fp8_recipe={' or '.join(others)}" if others else "precision=bf16_mixed"
    raise UserError(
        f"precision.fp8_recipe={keys.fp8_recipe} needs {recipe.architectures} (compute capability "
        f"{recipe.lowest[0]}.{recipe.lowest[1]}), but {where} has {capability[0]}.{capability[1]}; choose {remedy}, or "
        "another GPU"
    )


def check_gpus_present(config: RunConfig) -> None:
    """Check that the GPUs of this machine support the FP8 recipe, and that Transformer Engine is installed.

    GPUs are queried with ``nvidia-smi``: PyTorch would initialize CUDA, which does not survive the fork of ranks.

    Raises:
        UserError: a GPU does not support the recipe, or Transformer Engine is missing.
    """
    keys = config.precision
    if keys.fp8 is None or keys.fp8_simulation:
        return
    for capability in capabilities_present():
        check_capability(config, capability, "a GPU of this machine")
    if not transformer_engine_is_used():
        raise UserError(
            f"{FP8}={keys.fp8} requires Transformer Engine, which is not installed; use NVIDIA's container, or choose "
            "precision=bf16_mixed"
        )


def capabilities_present() -> list[Capability]:
    """Compute capabilities of the GPUs that this process may use; empty if ``nvidia-smi`` fails."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in output.split():
        major, _, minor = line.partition(".")
        if major.isdigit() and minor.isdigit():
            found.append((int(major), int(minor)))
    return sorted(set(found))


def fp8_simulation(keys: PrecisionConfig) -> dict[str, Any] | None:
    """Fields of :class:`nemo_rao.mcore.fp8_simulation.Fp8Simulation`, or ``None``."""
    if keys.fp8 is None or not keys.fp8_simulation:
        return None
    return {
        "format": keys.fp8,
        "recipe": keys.fp8_recipe,
        "amax_history_len": keys.fp8_amax_history_len,
        "amax_compute_algo": keys.fp8_amax_compute_algo,
        "margin": keys.fp8_margin,
        "wgrad": keys.fp8_wgrad,
        "num_layers_at_start_in_bf16": keys.num_layers_at_start_in_bf16 if keys.first_last_layers_bf16 else 0,
        "num_layers_at_end_in_bf16": keys.num_layers_at_end_in_bf16 if keys.first_last_layers_bf16 else 0,
    }
