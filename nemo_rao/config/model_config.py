"""The keys of ``model``: network, parallelism, adapters, optimizer, and one block for each objective.

An objective's block is that objective's typed config, taken from the table in ``nemo_rao.objectives.registry``: a new
objective needs no edit here.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_rao.config.families import FAMILIES
from nemo_rao.keys import KeySpec, key, section
from nemo_rao.objectives.registry import OBJECTIVES


@dataclass
class RopeScalingConfig:
    """Llama 3.1's scaling of rotary frequencies, for contexts longer than the original training context."""

    factor: float | None = key(None, "low frequencies are divided by it; null: no scaling", low=0, exclusive=True)
    low_freq_factor: float = key(
        1.0, "frequencies with fewer rotations in the original context are low", low=0, exclusive=True
    )
    high_freq_factor: float = key(
        4.0, "frequencies with more rotations are kept; those in between are interpolated", low=0, exclusive=True
    )
    original_max_position_embeddings: int = key(8192, "tokens of the original context", low=1)


@dataclass
class ArchitectureConfig:
    """Sizes of a model of ``model.family``; ``None``: the family's default, or derived from the others by Megatron."""

    num_layers: int | None = key(None, "transformer layers", low=1)
    hidden_size: int | None = key(None, "width of the residual stream", low=1)
    ffn_hidden_size: int | None = key(None, "width of the feed-forward layers", low=1)
    num_attention_heads: int | None = key(None, "attention heads", low=1)
    num_query_groups: int | None = key(None, "key/value heads (grouped-query attention)", low=1)
    kv_channels: int | None = key(None, "width of one head", low=1)
    rotary_base: float | None = key(None, "base of the rotary position embedding", low=0, exclusive=True)
    rope_scaling: RopeScalingConfig = section(RopeScalingConfig, "rotary scaling of Llama 3.1 and later")
    share_embeddings_and_output_weights: bool | None = key(None, "one matrix for input and output embeddings")
    make_vocab_size_divisible_by: int | None = key(None, "tokens; the vocabulary is padded to a multiple of it", low=1)
    attention_dropout: float | None = key(None, "probability", low=0, high=1)
    hidden_dropout: float | None = key(None, "probability", low=0, high=1)
    extra: dict[str, Any] = key({}, "additional fields of Megatron's config, such as {vocab_size: 128256}")


@dataclass
class LoraConfig:
    dim: int = key(16, "rank of the adapters", low=1)
    alpha: int = key(32, "the adapters' output is scaled by alpha / dim", low=1)
    dropout: float = key(0.0, "probability", low=0, high=1)
    target_modules: list[str] = key(
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "linear layers with an adapter: these, output_layer, Hugging Face's names (all parts of a fused layer; with "
        "canonical_lora, any part), all-linear, or patterns such as *.layers.0.*.linear_qkv",
    )


@dataclass
class PeftConfig:
    scheme: str = key(
        "none",
        "none: train every weight; otherwise only low-rank adapters: lora, one per linear layer; canonical_lora, one "
        "per part of a fused layer; dora, with a trained magnitude per row (the last two require engine bridge)",
        choices=("none", "lora", "canonical_lora", "dora"),
    )
    lora: LoraConfig = section(LoraConfig, "used by every adapter scheme")


@dataclass
class ScheduleConfig:
    name: str = key("cosine", "learning rate schedule after warm-up", choices=("cosine", "constant"))
    warmup_steps: int = key(0, "steps of linear warm-up from 0", low=0)
    constant_steps: int = key(0, "cosine: steps at min_lr at the end of the run", low=0)
    min_lr: float = key(0.0, "cosine: learning rate at the end", low=0)


@dataclass
class OptimizerConfig:
    name: str = key("adam", "Megatron's optimizer (AdamW)", choices=("adam",))
    lr: float = key(5e-7, "peak learning rate", low=0, exclusive=True)
    weight_decay: float = key(0.0, "decoupled; not applied to biases and norms", low=0)
    betas: list[float] = key([0.9, 0.98], "Adam's decay rates for the gradient and its square", low=0, high=1)
    eps: float = key(1e-8, "Adam's epsilon", low=0, exclusive=True)
    use_distributed_optimizer: bool = key(True, "split the optimizer's state over data-parallel ranks")
    overlap_grad_reduce: bool = key(False, "reduce gradients during the backward pass; for GPUs")
    overlap_param_gather: bool = key(False, "gather updated weights during the forward pass; for GPUs")
    cpu_offload_fraction: float = key(
        0.0,
        "fraction of the optimizer's state that is kept and updated in host memory; requires Transformer Engine",
        low=0,
        high=1,
    )
    sched: ScheduleConfig = section(ScheduleConfig, "learning rate over the run")


@dataclass
class ModelKeys:
    """``model`` without the objectives' blocks; see :class:`ModelConfig`."""

    objective: str = key("rao", "name of the objective; its keys are in the block of this name below")
    family: str = key(
        "llama", "architecture, by Hugging Face's model_type; its sizes are in arch", choices=tuple(FAMILIES)
    )
    config_class: str | None = key(
        None, "deprecated: a class of nemo.collections.llm, instead of family; NeMo's engine only"
    )
    arch: ArchitectureConfig = section(ArchitectureConfig, "sizes; null: the family's, or derived from the others")
    restore_from_path: str | None = key(
        None, "directory of a checkpoint or run to start from; null: random weights from trainer.seed"
    )
    allow_random_weights: bool = key(
        False, "train a model of more than 1 billion parameters from random weights; false: refused"
    )
    allow_pickle: bool = key(
        False,
        "read checkpoints whose pickles name more than tensors and numbers; they can run code, so trust their author",
    )
    fused_log_probs: bool = key(
        True,
        "compute log-probabilities from the last hidden states, block by block, without storing logits; false: from "
        "full logits",
    )
    seq_length: int = key(
        1024, "maximum tokens of prompt and response together; longer rows are dropped and counted", low=2
    )
    micro_batch_size: int = key(1, "prompts per forward pass, each with all its responses", low=1)
    global_batch_size: int = key(8, "prompts per optimizer step, over all ranks", low=1)
    tensor_model_parallel_size: int = key(1, "ranks that share each layer", low=1)
    pipeline_model_parallel_size: int = key(1, "ranks that share the stack of layers", low=1)
    virtual_pipeline_model_parallel_size: int | None = key(
        None, "layer groups per pipeline rank (interleaved schedule); null: one", low=2
    )
    context_parallel_size: int = key(1, "ranks that share each sequence", low=1)
    expert_model_parallel_size: int = key(
        1, "ranks that a layer's experts are split over; taken from the data-parallel ranks", low=1
    )
    expert_tensor_parallel_size: int | None = key(
        None, "ranks that share each expert; null: model.tensor_model_parallel_size", low=1
    )
    sequence_parallel: bool = key(False, "also split norms and dropout over tensor-parallel ranks; saves memory")
    recompute_granularity: str | None = key(
        None,
        "activations recomputed in the backward pass to save memory: selective, attention only; full, whole layers; "
        "null: none",
        choices=(None, "selective", "full"),
    )
    recompute_method: str | None = key(
        None, "full recompute: which layers, as in Megatron; null: uniform", choices=(None, "uniform", "block")
    )
    recompute_num_layers: int | None = key(
        None, "full recompute: layers per uniform unit, or in the block of each stage; null: 1", low=1
    )
    cpu_offloading_num_layers: int | None = key(
        None,
        "layers, from the first, whose activations are kept in host memory until the backward pass; must be below the "
        "number of layers. Requires Transformer Engine; null: none",
        low=1,
    )
    peft: PeftConfig = section(PeftConfig, "which weights are trained")
    optim: OptimizerConfig = section(OptimizerConfig, "optimizer")


def _with_objectives(keys: type) -> type:
    """``keys`` with one additional field per objective: its config, under its name."""
    blocks = [
        (
            name,
            objective.config_type,
            dataclasses.field(
                default_factory=objective.config_type, metadata={"key": KeySpec(f"used with objective {name}")}
            ),
        )
        for name, objective in OBJECTIVES.items()
    ]
    made = dataclasses.make_dataclass("ModelConfig", blocks, bases=(keys,))
    made.__module__ = __name__  # so that a config can be pickled and sent to other ranks
    made.__doc__ = "All keys of ``model``, including one block per objective."
    return made


if TYPE_CHECKING:
    ModelConfig = ModelKeys
else:
    ModelConfig = _with_objectives(ModelKeys)
