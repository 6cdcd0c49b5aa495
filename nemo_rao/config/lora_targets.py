"""``model.peft.lora.target_modules``: which linear layers get an adapter, checked before anything is imported.

    decoder.layers.N.self_attention.linear_qkv    q_proj, k_proj and v_proj of Hugging Face's models, in one matrix
    decoder.layers.N.self_attention.linear_proj   o_proj
    decoder.layers.N.mlp.linear_fc1               gate_proj and up_proj, in one matrix; experts get no adapters
    decoder.layers.N.mlp.linear_fc2               down_proj
    output_layer                                  lm_head

A target is the last part of such a name, or a pattern of the whole name with ``*``, such as
``*.layers.0.*.linear_qkv``. N is the index of the layer in the whole model, from 0, on every pipeline stage.

**Choice** Hugging Face's names are accepted if they mean the same as Megatron's: a fused matrix has one adapter, so all
of its parts must be named. With ``model.peft.scheme=canonical_lora`` each part has a separate adapter and may be named
alone: linear_q, linear_k, linear_v, linear_fc1_gate, linear_fc1_up, or as in Hugging Face's models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, did_you_mean

KEY = "model.peft.lora.target_modules"
OUTPUT_LAYER = "output_layer"
ATTENTION, FEED_FORWARD = ("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")
OF_LAYERS = (*ATTENTION, *FEED_FORWARD)

# Megatron's linear layer -> the names of its parts in Hugging Face's models; each set of names means the layer.
_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "linear_qkv": (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",), ("Wqkv",)),
    "linear_proj": (("o_proj",), ("out_proj",), ("dense",)),
    "linear_fc1": (("gate_proj", "up_proj"), ("gate_up_proj",), ("dense_h_to_4h",)),
    "linear_fc2": (("down_proj",), ("dense_4h_to_h",)),
    OUTPUT_LAYER: (("lm_head",),),
}
# Parts with separate adapters in canonical LoRA, by Megatron-Bridge's names, in the order of _PARTS.
SPLIT = {"linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("linear_fc1_gate", "linear_fc1_up")}
_FUSED = {part: layer for layer, parts in SPLIT.items() for part in parts}
_ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output layer
_NAMES = ", ".join((*OF_LAYERS, OUTPUT_LAYER))
_NOT_LINEAR = {"embed_tokens", "wte", "word_embeddings", "embedding", "embedding.word_embeddings", "router", "gate"}


def splits(config: RunConfig) -> bool:
    """Whether the parts of fused layers have separate adapters."""
    return config.model.peft.scheme == "canonical_lora"


def lora_targets(config: RunConfig) -> tuple[str, ...]:
    """The run's targets without duplicates: Megatron's names and patterns, in the given order.

    Raises:
        UserError: a name is unknown, or is a part of a fused layer whose other parts are missing.
    """
    given, split = config.model.peft.lora.target_modules, splits(config)
    if not given:
        raise UserError(f"{KEY}=[]: no layer gets an adapter; list some of {_NAMES}")
    found: dict[str, None] = {}
    for name in given:
        if "*" in name:
            found[name] = None
            continue
        layers = OF_LAYERS if name == _ALL_LINEAR else (name,) if name in (*OF_LAYERS, OUTPUT_LAYER) else None
        if layers is not None:
            parts = [part for layer in layers for part in (SPLIT.get(layer, (layer,)) if split else (layer,))]
        else:
            parts = _parts_named(name) if split else [_layer_of_part(name, given)]
        found |= dict.fromkeys(parts)
    return tuple(found)


def _parts_named(name: str) -> list[str]:
    """The parts of a layer, each with a separate adapter, that ``name`` means."""
    if name in _FUSED:
        return [name]
    for layer, spellings in _PARTS.items():
        own = SPLIT.get(layer, (layer,))
        for parts in spellings:
            if name in parts:
                return list(own) if len(parts) == 1 else [own[parts.index(name)]]
    raise _unknown(name, _FUSED)


def _layer_of_part(name: str, given: Sequence[str]) -> str:
    for layer, spellings in (*_PARTS.items(), *((layer, (parts,)) for layer, parts in SPLIT.items())):
        for parts in spellings:
            if name not in parts:
                continue
            if missing := [part for part in parts if part not in given]:
                raise UserError(
                    f"{KEY}: {name} is a part of Megatron's {layer}, which has one adapter for {_and(parts)}; "
                    f"add {_and(missing)}, or use {layer}, or model.peft.scheme=canonical_lora"
                )
            return layer
    raise _unknown(name, ())


def _unknown(name: str, further: Iterable[str]) -> UserError:
    if name in _NOT_LINEAR:
        return UserError(f"{KEY}: {name} is not a linear layer that can have an adapter; use some of {_NAMES}")
    known = [
        *OF_LAYERS,
        OUTPUT_LAYER,
        *further,
        *(part for sets in _PARTS.values() for parts in sets for part in parts),
    ]
    hint = did_you_mean(name, known)
    return UserError(f"{KEY}: the model has no linear layer {name}{hint or f'; it has {_NAMES}'}")


def linear_layers(num_layers: int, *, experts: bool, split: bool = False) -> list[str]:
    """Names of the whole model's layers that can have an adapter; ``split``: fused layers are given by their parts."""
    layers = [("self_attention", name) for name in ATTENTION]
    layers += [] if experts else [("mlp", name) for name in FEED_FORWARD]
    parts = [(block, part) for block, name in layers for part in (SPLIT.get(name, (name,)) if split else (name,))]
    of_layers = [f"decoder.layers.{number}.{block}.{part}" for number in range(num_layers) for block, part in parts]
    return [*of_layers, OUTPUT_LAYER]


def fused(name: str) -> str:
    """The name of the layer that ``name`` is a part of; for a whole layer, ``name`` unchanged."""
    before, dot, last = name.rpartition(".")
    return before + dot + _FUSED.get(last, last)


def adapted(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """The ``names`` that match a target. A pattern that matches a layer matches all of its parts."""
    targets = list(targets)
    return [name for name in names if any(_means(target, name) for target in targets)]


def _means(target: str, name: str) -> bool:
    if "*" not in target:
        return name.rpartition(".")[2] == target
    expression = ".*".join(map(re.escape, target.split("*")))
    # Patterns written for NeMo may start with its wrapper's name.
    return any(re.fullmatch(expression, before + one) for before in ("", "module.") for one in (name, fused(name)))


def check_targets(config: RunConfig, *, num_layers: int | None, experts: bool) -> None:
    """Check that every target matches a layer, and that every pipeline stage has an adapter to train.

    Args:
        num_layers: layers of the whole model; ``None``: not known yet, so matches and stages are not checked.
        experts: whether its feed-forward layers are experts.

    Raises:
        UserError: on the first violated rule.
    """
    if config.model.peft.scheme == "none":
        return
    targets, scheme = lora_targets(config), config.model.peft.scheme
    if scheme == "dora" and config.model.peft.lora.dropout:
        dropout = config.model.peft.lora.dropout
        raise UserError(f"model.peft.lora.dropout={dropout:g}: scheme dora has no dropout; set it to 0")
    if scheme == "dora" and adapted(targets, [OUTPUT_LAYER]):
        raise UserError(f"{KEY}: {OUTPUT_LAYER} gets no adapter with scheme dora; leave it out, or use scheme lora")
    dim, tensor = config.model.peft.lora.dim, config.model.tensor_model_parallel_size
    if dim % tensor:
        raise UserError(
            f"model.peft.lora.dim={dim} is not divisible by model.tensor_model_parallel_size={tensor}; each rank takes "
            "an equal part of an adapter, so change one of them"
        )
    if experts and (of_experts := [name for name in targets if fused(name) in FEED_FORWARD]):
        raise UserError(f"{KEY}: {_and(of_experts)}: experts get no adapters; use {_and(ATTENTION)}")
    if num_layers is None:
        return
    names = linear_layers(num_layers, experts=experts, split=splits(config))
    for target in targets:
        if not adapted([target], names):
            raise UserError(
                f"{KEY}: {target} matches no linear layer of the model; its layers are 0 to {num_layers - 1}, such as "
                f"{names[0]}"
            )
    _check_stages(config, set(adapted(targets, names)), num_layers)


def _check_stages(config: RunConfig, names: set[str], num_layers: int) -> None:
    """Refuse stages without an adapter: Megatron's optimizer can neither save nor load an empty state."""
    stages = config.model.pipeline_model_parallel_size
    with_adapters = {int(name.split(".")[2]) for name in names if name != OUTPUT_LAYER}
    layers = layers_of_stages(config, num_layers)
    if layers is None:
        return  # checked on the ranks
    for stage, of_stage in enumerate(layers):
        if not with_adapters & of_stage and not (stage == stages - 1 and OUTPUT_LAYER in names):
            raise UserError(
                f"{KEY}={config.model.peft.lora.target_modules}: pipeline stage {stage} of {stages} (layers "
                f"{_spans(sorted(of_stage))}) has no adapter to train; add a target in it, or lower "
                "model.pipeline_model_parallel_size"
            )


def layers_of_stages(config: RunConfig, num_layers: int) -> list[set[int]] | None:
    """Indices of the layers of each pipeline stage; ``None`` for layouts that are not computed here."""
    stages, virtual = config.model.pipeline_model_parallel_size, config.model.virtual_pipeline_model_parallel_size or 1
    extra, parts = config.model.arch.extra, stages * virtual
    at_ends = [extra.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last")]
    if extra.get("pipeline_model_parallel_layout") is not None or (virtual > 1 and at_ends != [None, None]):
        return None
    counted = [bool(extra.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss")]
    equal = parts - sum(size is not None for size in at_ends)
    each = (num_layers + sum(counted) - sum(size or 0 for size in at_ends)) // max(equal, 1)
    sizes = [each] * parts
    for part, size, less in zip((0, -1), at_ends, counted, strict=True):
        sizes[part] = (sizes[part] if size is None else size) - less
    found: list[set[int]] = [set() for _ in range(stages)]
    for part, size in enumerate(sizes):
        first = sum(sizes[:part])
        found[part % stages] |= set(range(first, first + size))
    return found


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _spans(numbers: Sequence[int]) -> str:
    """Such as ``0-3`` or ``0-1, 4-5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
