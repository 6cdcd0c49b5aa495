"""A run's keys as fields of megatron-core's configs, the same on every engine."""

from __future__ import annotations

from typing import Any

from nemo_rao.config.run_config import PrecisionConfig, RunConfig

_FP8 = (
    "fp8",
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "fp8_param_gather",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)


def recompute_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig``: which activations are recomputed."""
    keys = config.model
    full = keys.recompute_granularity == "full"
    return {
        "recompute_granularity": keys.recompute_granularity,
        "recompute_method": (keys.recompute_method or "uniform") if full else None,
        "recompute_num_layers": (keys.recompute_num_layers or 1) if full else None,
    }


def offload_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig``: the layers whose activations are offloaded to host memory."""
    layers = config.model.cpu_offloading_num_layers
    if layers is None:
        return {}
    return {
        "cpu_offloading": True,
        "cpu_offloading_num_layers": layers,
        "cpu_offloading_activations": True,
        "cpu_offloading_weights": False,
    }


def parallel_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``ModelParallelConfig``: how the model is split over ranks."""
    keys = config.model
    return {
        "tensor_model_parallel_size": keys.tensor_model_parallel_size,
        "pipeline_model_parallel_size": keys.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": keys.virtual_pipeline_model_parallel_size,
        "context_parallel_size": keys.context_parallel_size,
        "expert_model_parallel_size": keys.expert_model_parallel_size,
        "sequence_parallel": keys.sequence_parallel and keys.tensor_model_parallel_size > 1,
    }


def messages_between_stages(config: RunConfig) -> dict[str, bool]:
    """Fields of ``ModelParallelConfig``: how pipeline stages communicate, if Megatron's default does not work.

    Two stages of an interleaved pipeline send each other activations and gradients at the same time. In one batch of
    messages, Megatron's default, one is mistaken for the other.
    """
    interleaved = config.model.virtual_pipeline_model_parallel_size is not None
    return {"overlap_p2p_comm": True, "batch_p2p_comm": False} if interleaved else {}


def ddp_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``DistributedDataParallelConfig``: how gradients are reduced."""
    keys = config.model.optim
    return {
        # Megatron would raise before the step's rows and rewards are known (:mod:`nemo_rao.loop.finite`).
        "check_for_nan_in_grad": False,
        "grad_reduce_in_fp32": config.precision.grad_reduce_in_fp32,
        "use_distributed_optimizer": keys.use_distributed_optimizer,
        "overlap_grad_reduce": keys.overlap_grad_reduce,
        "overlap_param_gather": keys.overlap_param_gather,
    }


def optimizer_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``OptimizerConfig``; ``lr`` is the peak learning rate."""
    keys = config.model.optim
    return {
        "optimizer": keys.name,
        "lr": keys.lr,
        "weight_decay": keys.weight_decay,
        "adam_beta1": keys.betas[0],
        "adam_beta2": keys.betas[1],
        "adam_eps": keys.eps,
        "clip_grad": config.trainer.gradient_clip_val,
        "use_distributed_optimizer": keys.use_distributed_optimizer,
        **_optimizer_offload(keys.cpu_offload_fraction),
    }


def _optimizer_offload(fraction: float) -> dict[str, Any]:
    if fraction == 0:
        return {}
    # Megatron's hybrid optimizer keeps the master weights itself, as precision-aware optimizers do.
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "use_precision_aware_optimizer": True,
    }


def optimizer_precision_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of ``OptimizerConfig``: number formats, except ``params_dtype``. Engines set these for their own."""
    keys = config.precision
    return {
        "bf16": keys.params == "bf16",
        "fp16": keys.params == "fp16",
        "loss_scale": keys.fp16_loss_scale,
        "initial_loss_scale": keys.fp16_initial_loss_scale,
        "min_loss_scale": keys.fp16_min_loss_scale,
        "loss_scale_window": keys.fp16_loss_scale_window,
        "hysteresis": keys.fp16_hysteresis,
    }


def fp8_fields(keys: PrecisionConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig``: FP8. None in a simulation: Megatron would request it from Transformer Engine."""
    return {} if keys.fp8 is None or keys.fp8_simulation else {name: vars(keys)[name] for name in _FP8}
