"""Build NeMo's objects from a checked recipe, one per function."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.model.base import GPTConfig
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule, WarmupPolicyScheduler

from nemo_rao.config.architecture import architecture_fields, given_fields
from nemo_rao.config.derived import objective_config
from nemo_rao.config.experts import check_experts
from nemo_rao.config.lora_targets import check_targets
from nemo_rao.config.megatron_fields import (
    ddp_fields,
    fp8_fields,
    messages_between_stages,
    offload_fields,
    optimizer_fields,
    parallel_fields,
    recompute_fields,
)
from nemo_rao.config.precision_checks import fp8_simulation
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.tokenizer import save_for_4, written_by_5
from nemo_rao.engines.nemo.families import check_fields, class_named, config_of_family, construct
from nemo_rao.engines.nemo.kept_checkpoints import StepCheckpoint
from nemo_rao.engines.nemo.lora import lora
from nemo_rao.engines.nemo.model import MegatronGPTAlignmentModel
from nemo_rao.engines.nemo.strategy import AlignmentStrategy
from nemo_rao.errors import UserError
from nemo_rao.mcore.heads import VALUE_HEAD

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISIONS: dict[str, Any] = {"fp32": "32", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def model_config(config: RunConfig) -> GPTConfig:
    """Return NeMo's config of the recipe's network.

    Raises:
        UserError: NeMo has no such network, or no such field.
    """
    keys = config.model
    more = {
        **recompute_fields(config),
        **offload_fields(config),
        **messages_between_stages(config),
        "seq_length": keys.seq_length,
    }
    more = {name: value for name, value in more.items() if name not in keys.arch.extra}
    if keys.config_class is None:
        made = config_of_family(keys.family, architecture_fields(config), **more)
    else:
        made = _config_of_class(config, keys.config_class, more)
    check_experts(config, vars(made))
    check_targets(config, num_layers=made.num_layers, experts=bool(made.num_moe_experts))
    return made


def _config_of_class(config: RunConfig, name: str, more: dict[str, Any]) -> GPTConfig:
    """Return the config of a recipe that names a class of NeMo."""
    given, key = given_fields(config), f"model.config_class={name}"
    if "rope_scaling" in given:
        raise UserError(
            f"model.arch.rope_scaling.factor={given['rope_scaling']['factor']}: requires model.family. Set that "
            f"instead of {key}."
        )
    config_class = class_named(name, "model.config_class")
    check_fields(config_class, config.model.arch.extra)
    return construct(config_class, {**given, **more})


def _of_value_head(name: str, parameter: torch.nn.Parameter) -> bool:
    return VALUE_HEAD in name


def optimizer(config: RunConfig, max_steps: int) -> MegatronOptimizerModule:
    keys = config.model.optim
    # The learning rate of a value head is a key of its objective; NeMo scales the schedule's initial rate.
    value_lr = getattr(objective_config(config), "value_lr", None)
    if keys.sched.name == "cosine":
        schedule: Any = CosineAnnealingScheduler(
            max_steps=max_steps,
            warmup_steps=keys.sched.warmup_steps,
            constant_steps=keys.sched.constant_steps,
            min_lr=keys.sched.min_lr,
        )
    else:
        schedule = WarmupPolicyScheduler(max_steps=max_steps, warmup_steps=keys.sched.warmup_steps)
    return MegatronOptimizerModule(
        scale_lr_cond=_of_value_head if value_lr is not None else None,
        lr_mult=value_lr / keys.lr if value_lr is not None else 1.0,
        config=OptimizerConfig(
            **optimizer_fields(config),
            bf16=config.precision.params == "bf16",
            fp16=config.precision.params == "fp16",
            params_dtype=_DTYPES[config.precision.params],
        ),
        lr_scheduler=schedule,
    )


def tokenizer(config: RunConfig) -> AutoTokenizer:
    """Return the Hugging Face tokenizer in NeMo's wrapper."""
    assert config.data.tokenizer is not None
    return AutoTokenizer(_loadable(str(Path(config.data.tokenizer).expanduser())), trust_remote_code=False)


@functools.cache
def _loadable(name: str) -> str:
    """Return the tokenizer's directory or name, or a temporary copy if NeMo could not load it."""
    if not written_by_5(name):
        return name
    folder = tempfile.mkdtemp(prefix="nemo_rao_tokenizer_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_for_4(name, folder)
    return folder


def model(config: RunConfig, resolved: Any, max_steps: int) -> MegatronGPTAlignmentModel:
    """Build the recipe's model; ``resolved``: the objective's keys, with values resolved from the data."""
    return MegatronGPTAlignmentModel(
        model_config(config),
        objective=config.model.objective,
        objective_config=resolved,
        optim=optimizer(config, max_steps),
        tokenizer=tokenizer(config),
        model_transform=lora(config),
        fused_log_probs=config.model.fused_log_probs,
        head_seed=config.trainer.seed,
        fp8_simulation=fp8_simulation(config.precision),
        shared_prompts=config.data.prefix_sharing,
        packed=config.data.packing,
    )


# Fields of Megatron's config that assign layers to stages: NeMo's strategy overwrites them.
_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def strategy(config: RunConfig) -> AlignmentStrategy:
    keys = config.model
    made = AlignmentStrategy(
        **{name: value for name, value in keys.arch.extra.items() if name in _STAGES},
        **parallel_fields(config),
        expert_tensor_parallel_size=keys.expert_tensor_parallel_size,
        pipeline_dtype=_DTYPES[config.precision.params],
        ddp=DistributedDataParallelConfig(**ddp_fields(config)),
        # The reshardable format lets a run resume under another TP, PP or DP, and is the only one that supports torch's
        # Adam, which is used if apex and Transformer Engine are absent.
        ckpt_optim_fully_reshardable=True,
        ckpt_async_save=config.exp_manager.checkpoint_callback_params.async_save,
        # NeMo's progress printer calls a collective on rank 0 only, which hangs the next one over gloo.
        replace_progress_bar=False,
    )
    made.seed = config.trainer.seed
    return made


def precision(config: RunConfig) -> nl.MegatronMixedPrecision:
    """Return the number formats that NeMo writes into Megatron's configs of model, optimizer and gradient buffers."""
    keys = config.precision
    dtype = _DTYPES[keys.params]
    return nl.MegatronMixedPrecision(
        precision=_PRECISIONS[keys.params],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_enabled=False,
        grad_reduce_in_fp32=keys.grad_reduce_in_fp32,
        **fp8_fields(keys),
        fp16_loss_scale=keys.fp16_loss_scale,
        fp16_initial_loss_scale=keys.fp16_initial_loss_scale,
        fp16_min_loss_scale=keys.fp16_min_loss_scale,
        fp16_loss_scale_window=keys.fp16_loss_scale_window,
        fp16_hysteresis=keys.fp16_hysteresis,
    )


def checkpoint_callback(config: RunConfig, folder: Path) -> StepCheckpoint:
    keys = config.exp_manager.checkpoint_callback_params
    return StepCheckpoint(
        dirpath=folder / "checkpoints",
        filename="{step}",
        monitor=keys.monitor,
        mode=keys.mode,
        save_top_k=keys.save_top_k,
        # A link if the newest is also among the best: nothing is written twice.
        save_last="link" if keys.save_last else False,
        every_n_train_steps=keys.every_n_train_steps,
        save_optim_on_train_end=True,  # a finished run can be extended
        verbose=False,
    )
