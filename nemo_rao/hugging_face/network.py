"""The keys of a recipe that describe an imported network: ``model.family`` and ``model.arch``, from its config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nemo_rao.config.families import family_of_model_type
from nemo_rao.config.model_config import ArchitectureConfig
from nemo_rao.hugging_face.config_keys import head_size
from nemo_rao.hugging_face.families import Family

# Fields that stand in every imported recipe, whatever the family's default: they say which model it is.
_ALWAYS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("rotary_base", "share_embeddings_and_output_weights"),
)


def network_fields(config: Any, family: Family) -> dict[str, Any]:
    """Fields of :mod:`nemo_rao.config.families` -> their values in this model; without ``vocab_size``.

    Args:
        config: from :func:`nemo_rao.hugging_face.config_keys.read_config`.
    """
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_size(config),
        "rotary_base": float(config.rope_theta),
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "layernorm_epsilon": config.rms_norm_eps,
        "init_method_std": config.initializer_range,
    }
    if family.scaling == "llama3" and config.rope_scaling:
        factors = {name: float(config.rope_scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        length = "original_max_position_embeddings"
        fields["rope_scaling"] = {**factors, length: int(config.rope_scaling[length])}
    if family.period and config.sliding_window is not None:
        # Megatron counts the tokens before the present one, Hugging Face that one, too.
        fields["window_size"] = [config.sliding_window - 1, 0]
        fields["window_attn_skip_freq"] = family.period if family.period > 1 else None
    values = vars(config)
    if "num_experts_per_tok" in values:
        fields["num_moe_experts"] = values.get("num_experts") or values["num_local_experts"]
        fields["moe_router_topk"] = config.num_experts_per_tok
        fields["moe_router_pre_softmax"] = not values.get("norm_topk_prob", True)
        if (width := values.get("moe_intermediate_size")) is not None:
            fields["moe_ffn_hidden_size"] = width
    if "query_pre_attn_scalar" in values:
        fields["softmax_scale"] = 1 / math.sqrt(config.query_pre_attn_scalar)
        fields["rotary_base_local"] = float(config.rope_local_base_freq)
    return fields


def model_keys(config: Any, family: Family) -> dict[str, Any]:
    """``model.family`` and ``model.arch`` of a recipe: sizes, and what is not as usual in the family."""
    known = family_of_model_type(family.model_type)
    assert known is not None, family
    usual = known.fields
    keys = {field.name for field in dataclasses.fields(ArchitectureConfig)}
    arch: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in network_fields(config, family).items():
        if name in _ALWAYS or not _same(value, usual.get(name)):
            (arch if name in keys else extra)[name] = value
    return {"family": known.name, "arch": {**arch, "extra": extra}}


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, float) and isinstance(usual, (int, float)):
        return math.isclose(value, usual, rel_tol=1e-12)
    return bool(value == (list(usual) if isinstance(usual, tuple) else usual))


def config_values(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Values of config.json of a network: what :func:`network_fields` reads, the other way round.

    Args:
        fields: all of a family's, as :func:`nemo_rao.config.architecture.architecture_fields` gives them.
    """
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    values: dict[str, Any] = {
        "num_hidden_layers": fields["num_layers"],
        "hidden_size": hidden,
        "intermediate_size": fields["ffn_hidden_size"] or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": fields["num_query_groups"] or heads,
        "rms_norm_eps": fields["layernorm_epsilon"],
        "initializer_range": fields["init_method_std"],
        "tie_word_embeddings": bool(fields["share_embeddings_and_output_weights"]),
        "rope_theta": float(fields["rotary_base"]),
    }
    kv_channels = fields["kv_channels"] or hidden // heads
    # Llama's config always has it, others' only where it does not follow from the sizes.
    if family.model_type not in ("mistral", "qwen2") or kv_channels * heads != hidden:
        values["head_dim"] = kv_channels
    if (scaling := fields.get("rope_scaling")) is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **scaling}
    if family.period:
        values["sliding_window"] = None if fields["window_size"] is None else fields["window_size"][0] + 1
    if (experts := fields["num_moe_experts"]) is not None:
        values["num_experts" if "num_experts" in family.reads else "num_local_experts"] = experts
        values["num_experts_per_tok"] = fields["moe_router_topk"]
    if "norm_topk_prob" in family.reads:
        values["norm_topk_prob"] = not fields["moe_router_pre_softmax"]
        values["moe_intermediate_size"] = fields["moe_ffn_hidden_size"] or values["intermediate_size"]
    if "query_pre_attn_scalar" in family.reads:
        scalar = fields["softmax_scale"] ** -2
        values["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
        values["rope_local_base_freq"] = float(fields["rotary_base_local"])
    return values
