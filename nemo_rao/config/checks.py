"""Checks across the keys of a run, before anything heavy is imported.

Ranges of single keys are checked when the config is created; the rules here relate several keys, files or the
machine. Nothing is written. A :class:`UserError` states the key, its value and what to change.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_rao.config.architecture import architecture_fields, check_family, network_key
from nemo_rao.config.derived import data_parallel_size, objective_config, parallel_multiple, run_dir, world_size
from nemo_rao.config.engine_choice import BRIDGE, NEMO, installed_engine
from nemo_rao.config.experts import check_experts
from nemo_rao.config.lora_targets import check_targets
from nemo_rao.config.monitor import check_monitor
from nemo_rao.config.offloading import check_offloading
from nemo_rao.config.online_checks import check_online
from nemo_rao.config.precision_checks import check_fp8_network, check_precision
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.rows.reading import expand_paths
from nemo_rao.runtime.gpus import transformer_engine_is_used


def check_config(config: RunConfig, *, data_exists: bool = True) -> None:
    """Check everything that can be decided from the config and the data files it names.

    Args:
        data_exists: ``False``: do not look for the data and the tokenizer.

    Raises:
        UserError: on the first violated rule.
    """
    check_sizes(config)
    _check_length(config)
    check_engine(config)
    check_network(config)
    _check_layout(config)
    check_offloading(config)
    _check_peft(config)
    check_online(config)
    check_monitor(config)
    if data_exists:
        check_sources(config)
    _check_results(config)


def check_keys_are_read(overrides: Sequence[str], config: RunConfig) -> None:
    """Refuse overrides in the blocks of other objectives, which would have no effect."""
    unread = {f"model.{name}" for name in registry.OBJECTIVES} - {f"model.{config.model.objective}"}
    for text in overrides:
        key = text.partition("=")[0]
        if key in unread or key.rpartition(".")[0] in unread:
            raise UserError(
                f"{text}: model.objective={config.model.objective} does not read {key}; set keys of "
                f"model.{config.model.objective}, or choose another recipe"
            )


def check_sizes(config: RunConfig) -> None:
    """Run the checks for which data and checkpoint need not be set: objective, ranks, batches, optimizer, precision.

    Raises:
        UserError: on the first violated rule.
    """
    registry.get(config.model.objective)  # refuses an unknown name
    _check_ranks(config)
    _check_batches(config)
    _check_recompute(config)
    _check_optimizer(config)
    check_precision(config)


def check_network(config: RunConfig) -> None:
    """Check that all sizes are known, and that the network, its experts and its adapters can be split as requested.

    Raises:
        UserError: on the first violated rule.
    """
    check_family(config)
    fields = architecture_fields(config)
    hidden_size, experts = fields.get("hidden_size"), bool(fields.get("num_moe_experts"))
    ffn_hidden_size = fields.get("ffn_hidden_size") or (hidden_size and 4 * hidden_size)
    check_architecture(
        config,
        num_layers=fields.get("num_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=None if experts else ffn_hidden_size,  # experts are split differently
        num_attention_heads=fields.get("num_attention_heads"),
        num_query_groups=fields.get("num_query_groups"),
        kv_channels=fields.get("kv_channels"),
    )
    check_experts(config, fields)
    check_targets(config, num_layers=fields.get("num_layers"), experts=experts)


def check_architecture(
    config: RunConfig,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    kv_channels: int | None = None,
) -> None:
    """Check that the network can be split by the parallel sizes.

    Called twice: with the recipe's values, and with the engine's once it is imported. ``None`` skips a check.

    Raises:
        UserError: on the first violated rule.
    """
    model = config.model
    tensor_parallel = f"model.tensor_model_parallel_size={model.tensor_model_parallel_size}"
    for name, value in (
        ("num_attention_heads", num_attention_heads),
        ("num_query_groups", num_query_groups),
        ("ffn_hidden_size", ffn_hidden_size),
    ):
        if value is not None and value % model.tensor_model_parallel_size:
            raise UserError(
                f"{_given(config, name, value)} is not divisible by {tensor_parallel}; each rank takes an equal part, "
                "so change one of them"
            )
    if num_attention_heads is not None and num_query_groups is not None and num_attention_heads % num_query_groups:
        raise UserError(
            f"{_given(config, 'num_attention_heads', num_attention_heads)} is not divisible by "
            f"{_given(config, 'num_query_groups', num_query_groups)}; change one of them"
        )
    if hidden_size is None or num_attention_heads is None or kv_channels is not None:
        pass  # the head dimension is not derived from these
    elif hidden_size % num_attention_heads:
        raise UserError(
            f"{_given(config, 'hidden_size', hidden_size)} is not divisible by "
            f"{_given(config, 'num_attention_heads', num_attention_heads)}; change one, or set model.arch.kv_channels"
        )
    if num_layers is not None and not any(key.startswith(UNEVEN_STAGES) for key in model.arch.extra):
        virtual = model.virtual_pipeline_model_parallel_size
        stages = model.pipeline_model_parallel_size * (virtual or 1)
        counted = [name for name in COUNTED_AS_LAYER if model.arch.extra.get(name)]
        if counted and (num_layers + len(counted)) % stages:
            raise UserError(
                f"{_given(config, 'num_layers', num_layers)} plus {len(counted)} counted by model.arch.extra."
                f"{' and '.join(counted)} is not divisible by the pipeline's {stages} layer groups; change one of them"
            )
        if not counted and num_layers % stages:
            times = f" x model.virtual_pipeline_model_parallel_size={virtual}" if virtual else ""
            raise UserError(
                f"{_given(config, 'num_layers', num_layers)} is not divisible by "
                f"model.pipeline_model_parallel_size={model.pipeline_model_parallel_size}{times}; all stages have the "
                "same number of layers, so change one of them"
            )
    check_fp8_network(
        config,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        kv_channels=kv_channels,
    )


# Prefixes of Megatron's fields that give pipeline stages different numbers of layers.
UNEVEN_STAGES = ("num_layers_in_", "pipeline_model_parallel_layout")
# Megatron's fields that count the embedding or the output layer as a layer when layers are assigned to stages.
COUNTED_AS_LAYER = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def _given(config: RunConfig, name: str, value: int) -> str:
    """``model.arch.NAME=VALUE``, with the source of a value that the config does not set."""
    from_elsewhere = "" if vars(config.model.arch)[name] is not None else f" (of {network_key(config)})"
    return f"model.arch.{name}={value}{from_elsewhere}"


def _check_length(config: RunConfig) -> None:
    trainer, sched = config.trainer, config.model.optim.sched
    if trainer.max_steps is None and trainer.max_epochs is None:
        raise UserError("trainer.max_steps and trainer.max_epochs are both null; set one, or the run never ends")
    if trainer.max_steps is not None and sched.warmup_steps + sched.constant_steps > trainer.max_steps:
        raise UserError(
            f"model.optim.sched.warmup_steps={sched.warmup_steps} + constant_steps={sched.constant_steps} exceed "
            f"trainer.max_steps={trainer.max_steps}; lower them"
        )
    steps = trainer.profile_steps
    if steps is not None and (len(steps) != 2 or steps[0] > steps[1]):
        raise UserError(f"trainer.profile_steps={steps}: must be the first and the last step, such as [10, 12]")
    if steps is not None and trainer.max_steps is not None and steps[1] > trainer.max_steps:
        raise UserError(
            f"trainer.profile_steps={steps}: the run ends at trainer.max_steps={trainer.max_steps}; use earlier steps"
        )


def _check_ranks(config: RunConfig) -> None:
    trainer, model = config.trainer, config.model
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    context, ranks = model.context_parallel_size, world_size(config)
    if ranks % (tensor * pipeline * context):
        raise UserError(
            f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes} = {ranks} ranks are not "
            f"divisible by tensor x pipeline x context parallel size = {tensor} x {pipeline} x {context} = "
            f"{tensor * pipeline * context}; set trainer.devices, or change the parallel sizes"
        )
    experts = model.expert_model_parallel_size * (model.expert_tensor_parallel_size or tensor) * pipeline
    if ranks % experts:
        raise UserError(
            f"trainer.devices={trainer.devices} x trainer.num_nodes={trainer.num_nodes} = {ranks} ranks are not "
            f"divisible by expert model x expert tensor x pipeline parallel size = {experts}; set "
            "model.expert_model_parallel_size, or trainer.devices"
        )
    virtual = model.virtual_pipeline_model_parallel_size
    if virtual is not None and pipeline == 1:
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={virtual} needs model.pipeline_model_parallel_size of at "
            "least 2; set it to null"
        )
    if model.sequence_parallel and tensor == 1:
        raise UserError(
            "model.sequence_parallel=true splits over tensor-parallel ranks, but there is only 1; "
            "set model.tensor_model_parallel_size, or sequence_parallel=false"
        )
    multiple = parallel_multiple(config)
    if model.seq_length % multiple:
        raise UserError(
            f"model.seq_length={model.seq_length} is not a multiple of {multiple}, which sequence and context "
            f"parallelism require; set it to {-(-model.seq_length // multiple) * multiple}"
        )


def _check_batches(config: RunConfig) -> None:
    model, ranks = config.model, data_parallel_size(config)
    if model.global_batch_size % (model.micro_batch_size * ranks):
        raise UserError(
            f"model.global_batch_size={model.global_batch_size} prompts are not divisible by "
            f"model.micro_batch_size={model.micro_batch_size} x {ranks} data-parallel ranks; change one of them"
        )
    micro_batches = model.global_batch_size // (model.micro_batch_size * ranks)
    if model.virtual_pipeline_model_parallel_size is not None and micro_batches % model.pipeline_model_parallel_size:
        raise UserError(
            f"model.global_batch_size={model.global_batch_size} gives {micro_batches} micro-batches per rank; the "
            "interleaved schedule needs a multiple of model.pipeline_model_parallel_size="
            f"{model.pipeline_model_parallel_size}; change a batch size, or unset "
            "model.virtual_pipeline_model_parallel_size"
        )


def _check_recompute(config: RunConfig) -> None:
    model = config.model
    for name, value in (
        ("recompute_method", model.recompute_method),
        ("recompute_num_layers", model.recompute_num_layers),
    ):
        if value is not None and model.recompute_granularity != "full":
            raise UserError(f"model.{name}={value} requires model.recompute_granularity=full; set that, or remove this")


def _check_layout(config: RunConfig) -> None:
    if not transformer_engine_is_used(config.trainer.accelerator):
        return
    size, dropout = config.model.context_parallel_size, config.model.arch.attention_dropout
    if config.data.prefix_sharing and size > 1:
        raise UserError(
            f"data.prefix_sharing=true with model.context_parallel_size={size}: not supported with Transformer Engine; "
            "set one of them to its default"
        )
    if config.data.prefix_sharing and dropout:
        raise UserError(
            f"data.prefix_sharing=true with model.arch.attention_dropout={dropout}: not supported with Transformer "
            "Engine; set one of them to its default"
        )
    if config.data.packing and size > 1:
        raise UserError(
            f"data.packing=true with model.context_parallel_size={size}: Transformer "
            "Engine splits each packed row separately, which is not supported yet; set one of them to its default"
        )


def _check_optimizer(config: RunConfig) -> None:
    optim = config.model.optim
    if len(optim.betas) != 2 or max(optim.betas) >= 1:
        raise UserError(f"model.optim.betas={optim.betas}: must be two numbers below 1, such as [0.9, 0.98]")
    if optim.sched.min_lr > optim.lr:
        raise UserError(
            f"model.optim.sched.min_lr={optim.sched.min_lr:g} is above model.optim.lr={optim.lr:g}; lower it"
        )
    if optim.overlap_param_gather and not (optim.use_distributed_optimizer and optim.overlap_grad_reduce):
        raise UserError(
            "model.optim.overlap_param_gather=true requires model.optim.use_distributed_optimizer=true and "
            "model.optim.overlap_grad_reduce=true; set both, or set it to false"
        )


def check_engine(config: RunConfig) -> None:
    """Refuse what the run's engine does not support. The engine need not be installed: login nodes have none.

    Raises:
        UserError: on the first violated rule.
    """
    keys, engine = config.model, config.trainer.engine
    engine = (installed_engine() if engine == "auto" else engine) or engine
    if engine == NEMO and keys.peft.scheme not in ("none", "lora"):
        raise UserError(
            f"model.peft.scheme={keys.peft.scheme}: engine {NEMO} supports only lora; set it to lora, or use "
            f"trainer.engine={BRIDGE}"
        )
    virtual = keys.virtual_pipeline_model_parallel_size
    if engine == NEMO and keys.peft.scheme != "none" and (virtual or 1) > 1:
        raise UserError(
            f"model.virtual_pipeline_model_parallel_size={virtual}: engine {NEMO} does not save adapters of "
            f"interleaved stages; set it to null, or use trainer.engine={BRIDGE}"
        )
    if engine == BRIDGE and keys.config_class is not None:
        raise UserError(
            f"model.config_class={keys.config_class}: must be null with engine {BRIDGE}, which has no NeMo "
            "classes; set model.family and model.arch instead"
        )


def _check_peft(config: RunConfig) -> None:
    needs = registry.get(config.model.objective).needs_of(objective_config(config))
    scheme = config.model.peft.scheme
    if scheme != "none" and needs.scores:
        raise UserError(
            f"model.peft.scheme={scheme} trains only adapters, but objective "
            f"{config.model.objective} also trains a head; set it to none"
        )
    if scheme != "none" and config.model.restore_from_path is None:
        raise UserError(
            f"model.peft.scheme={scheme} trains adapters of an existing model, but "
            "model.restore_from_path is null; set it to that model's checkpoint"
        )


def check_sources(config: RunConfig) -> None:
    """Check that data and tokenizer are set and exist.

    Raises:
        UserError: for the first that is missing.
    """
    data = config.data
    if data.train_path is None:
        raise UserError("data.train_path is not set; add data.train_path=FILE.jsonl")
    for key, value in (("train_path", data.train_path), ("validation_path", data.validation_path)):
        if value is not None:
            _check_data(f"data.{key}", value)
    if data.tokenizer is None:
        raise UserError("data.tokenizer is not set; set it to a Hugging Face tokenizer's directory or name")
    folder = os.path.expanduser(data.tokenizer)
    if (folder.startswith((".", "/")) or folder.count("/") > 1) and not os.path.isdir(folder):
        remedy = made_by(folder) or "give a tokenizer's directory or name"
        raise UserError(f"data.tokenizer={data.tokenizer}: no such directory; {remedy}")


def made_by(path: str) -> str | None:
    """What to do about a directory that does not exist, if a target of the Makefile creates it."""
    if "smollm2-135m-instruct" not in Path(path).parts:
        return None
    return "run make smollm2 in the repository, and run this command there"


def _check_results(config: RunConfig) -> None:
    name = config.exp_manager.name
    if not name or Path(name).name != name:
        raise UserError(
            f"exp_manager.name={name}: must be a single directory name; the path to it is exp_manager.exp_dir"
        )
    folder = run_dir(config).absolute()
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        what = "cannot be written to" if present.is_dir() else "is not a directory"
        raise UserError(f"exp_manager.exp_dir={config.exp_manager.exp_dir}: {present} {what}; choose another directory")


def _check_data(key: str, value: object) -> None:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{key}={value}: must be a path, or a list of paths such as [a.jsonl,b.jsonl]")
    try:
        expand_paths(paths)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
