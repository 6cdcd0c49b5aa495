"""Build Bridge's config from a checked recipe, one part per function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    OptimizerConfig,
    OptimizerConfigOverrideProvider,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
from megatron.core.optimizer import ParamGroupOverride, ParamKey

from nemo_rao.config.derived import objective_config
from nemo_rao.config.megatron_fields import ddp_fields, fp8_fields, optimizer_fields
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.bridge.provider import DTYPES
from nemo_rao.engines.bridge.seams import dataset_provider
from nemo_rao.mcore.heads import VALUE_HEAD


def container(config: RunConfig, provider: Any, data: Any, *, max_steps: int) -> ConfigContainer:
    """Build Bridge's config of a run. This project handles checkpoints, metrics, validation and signals, not Bridge.

    Args:
        provider: provider of the model.
        data: a :func:`data_set`.
    """
    keys = config.model
    return ConfigContainer(
        model=provider,
        dataset=data,
        mixed_precision=precision(config),
        optimizer=optimizer(config),
        optimizer_config_override_provider=HeadsRate(value_lr(config)),
        # The rate is set before each step (:mod:`nemo_rao.loop.schedule`); the scheduler only sets weight decay.
        scheduler=SchedulerConfig(
            lr_decay_style="constant",
            lr_warmup_iters=0,
            start_weight_decay=keys.optim.weight_decay,
            end_weight_decay=keys.optim.weight_decay,
            weight_decay_incr_style="constant",
        ),
        ddp=gradient_buffers(config),
        train=TrainingConfig(
            micro_batch_size=keys.micro_batch_size, global_batch_size=keys.global_batch_size, train_iters=max_steps
        ),
        validation=ValidationConfig(eval_iters=0, eval_interval=None),
        rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=False),
        checkpoint=CheckpointConfig(save=None, load=None),
        # Only used for the vocabulary size, which the provider defines.
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1),
        logger=LoggerConfig(skip_train_metrics_log=True, log_interval=max_steps + 1, tensorboard_dir=None),
        dist=DistributedInitConfig(
            distributed_backend="nccl" if torch.cuda.is_available() else "gloo",
            distributed_timeout_minutes=config.trainer.timeout_minutes,  # type: ignore[arg-type]
        ),
        rng=RNGConfig(seed=config.trainer.seed),
    )


def precision(config: RunConfig) -> MixedPrecisionConfig:
    """Return the number formats that Bridge writes into Megatron's configs of model, optimizer and gradient buffers."""
    keys = config.precision
    dtype = DTYPES[keys.params]
    fp8 = fp8_fields(keys)
    return MixedPrecisionConfig(
        **{keys.params: True},
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=keys.grad_reduce_in_fp32,
        loss_scale=keys.fp16_loss_scale,
        initial_loss_scale=keys.fp16_initial_loss_scale,
        min_loss_scale=keys.fp16_min_loss_scale,
        loss_scale_window=keys.fp16_loss_scale_window,
        hysteresis=keys.fp16_hysteresis,
        # Megatron asserts this combination if weights are gathered in this format.
        reuse_grad_buf_for_mxfp8_param_ag=bool(fp8) and keys.fp8_recipe == "mxfp8" and keys.fp8_param_gather,
        **fp8,
    )


def optimizer(config: RunConfig) -> OptimizerConfig:
    return OptimizerConfig(
        **optimizer_fields(config), min_lr=0.0, overlap_param_gather=config.model.optim.overlap_param_gather
    )


def gradient_buffers(config: RunConfig) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        **ddp_fields(config),
        average_in_collective=False,  # gradients are sums, divided once by the number of prompts
    )


def value_lr(config: RunConfig) -> float | None:
    """Return the learning rate of a value head, a key of its objective; ``None``: the same as for all weights."""
    given = getattr(objective_config(config), "value_lr", None)
    return None if given == config.model.optim.lr else given


@dataclass
class HeadsRate(OptimizerConfigOverrideProvider):
    """Sets a separate learning rate for a value head."""

    rate: float | None = None

    def build_config_overrides(self, context: Any) -> Any:
        overrides = dict(super().build_config_overrides(context) or {})
        if self.rate is not None:
            overrides[ParamKey(name=f"*{VALUE_HEAD}*")] = ParamGroupOverride(max_lr=self.rate)
        return overrides or None


def data_set(micro_batches: Any) -> Any:
    """Build Bridge's config of a data source that passes on an iterator over this rank's micro-batches."""

    @dataclass
    class Stream(dataset_provider()):  # type: ignore[misc]
        dataloader_type: str = "external"
        num_workers: int = 0
        pin_memory: bool = False
        persistent_workers: bool = False

        def build_datasets(self, context: Any) -> tuple[Any, None, None]:
            return micro_batches, None, None

    return Stream()
