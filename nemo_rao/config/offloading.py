"""Checks of what is moved to host memory: activations, and the optimizer's state."""

from __future__ import annotations

from nemo_rao.config.architecture import architecture_fields
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.gpus import transformer_engine_is_used


def check_offloading(config: RunConfig) -> None:
    """Refuses what the run's device or Megatron does not have.

    Raises:
        UserError: names the key.
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
            f"{given}: Transformer Engine's layers on a GPU alone can move activations to host memory; set it to null"
        )
    if layers is not None and number >= layers:
        raise UserError(f"{given}: must be below the number of layers, {layers}")
    if keys.pipeline_model_parallel_size > 1:
        raise UserError(
            f"{given}: Megatron does not move activations of a pipeline's stages "
            f"(model.pipeline_model_parallel_size={keys.pipeline_model_parallel_size}); set it to null"
        )
    if keys.recompute_granularity is not None:
        raise UserError(
            f"{given} and model.recompute_granularity={keys.recompute_granularity}: activations are either moved or "
            "recomputed; set one of them to null"
        )


def _check_optimizer(config: RunConfig) -> None:
    keys = config.model.optim
    given = f"model.optim.cpu_offload_fraction={keys.cpu_offload_fraction:g}"
    if keys.cpu_offload_fraction == 0:
        return
    if not transformer_engine_is_used(config.trainer.accelerator):
        raise UserError(
            f"{given}: Megatron moves the optimizer to host memory with Transformer Engine on a GPU alone; set it to 0"
        )
    if not keys.use_distributed_optimizer:
        raise UserError(f"{given} needs model.optim.use_distributed_optimizer=true")
