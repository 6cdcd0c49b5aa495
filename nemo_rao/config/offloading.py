"""Checks of offloading activations and optimizer state to host memory."""

from __future__ import annotations

from nemo_rao.config.architecture import architecture_fields
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import transformer_engine_is_used


def check_offloading(config: RunConfig) -> None:
    """Check that the run's device and Megatron support the requested offloading.

    Raises:
        UserError: on the first violated rule.
    """
    _check_activations(config)
    _check_optimizer(config)


def _check_activations(config: RunConfig) -> None:
    keys = config.model
    number = keys.cpu_offloading_num_layers
    if number is None:
        return
    given = f"model.cpu_offloading_num_layers={number}"
    layers = architecture_fields(config).get("num_layers")
    if not transformer_engine_is_used(config.trainer.accelerator):
        raise UserError(
            f"{given}: only Transformer Engine's layers on GPUs can offload activations to host memory; set it to null"
        )
    if layers is not None and number >= layers:
        raise UserError(f"{given}: must be below the number of layers, {layers}")
    if keys.pipeline_model_parallel_size > 1:
        raise UserError(
            f"{given}: Megatron does not offload activations with pipeline parallelism "
            f"(model.pipeline_model_parallel_size={keys.pipeline_model_parallel_size}); set it to null"
        )
    if keys.recompute_granularity is not None:
        raise UserError(
            f"{given} and model.recompute_granularity={keys.recompute_granularity}: activations are either offloaded "
            "or recomputed; set one of the two to null"
        )


def _check_optimizer(config: RunConfig) -> None:
    keys = config.model.optim
    given = f"model.optim.cpu_offload_fraction={keys.cpu_offload_fraction:g}"
    if keys.cpu_offload_fraction == 0:
        return
    if not transformer_engine_is_used(config.trainer.accelerator):
        raise UserError(
            f"{given}: Megatron offloads the optimizer's state only on GPUs with Transformer Engine; set it to 0"
        )
    if not keys.use_distributed_optimizer:
        raise UserError(f"{given} requires model.optim.use_distributed_optimizer=true; set that, or set this to 0")
