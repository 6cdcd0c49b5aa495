"""Translation of a network between config.json and a recipe's ``model.family`` and ``model.arch``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nemo_rao.config.model_config import ArchitectureConfig
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import head_size, keys_of_network
from nemo_rao.hugging_face.families import Family

# Fields written to every imported recipe, even at the family's default: they identify the model.
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
    if family.rope_type == "llama3" and config.rope_scaling:
        factors = {name: float(config.rope_scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        length = "original_max_position_embeddings"
        fields["rope_scaling"] = {**factors, length: int(config.rope_scaling[length])}
    if family.period and config.sliding_window is not None:
        # Megatron counts the tokens before the current one; Hugging Face includes the current one.
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
    """``model.family`` and ``model.arch`` of a recipe: sizes, and values that differ from the family's defaults."""
    usual = family.network.fields
    keys = {field.name for field in dataclasses.fields(ArchitectureConfig)}
    arch: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in network_fields(config, family).items():
        if name in _ALWAYS or not _same(value, usual.get(name)):
            (arch if name in keys else extra)[name] = value
    return {"family": family.network.name, "arch": {**arch, "extra": extra}}


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, float) and isinstance(usual, (int, float)):
        return math.isclose(value, usual, rel_tol=1e-12)
    return bool(value == (list(usual) if isinstance(usual, tuple) else usual))


def transformers_config(
    fields: Mapping[str, Any],
    family: Family,
    *,
    vocab_size: int,
    seq_length: int,
    carried: Mapping[str, Any] | None = None,
    location: str,
) -> Any:
    """Build a network's config object of the installed release of transformers.

    Args:
        fields: all fields of the family, as returned by :func:`nemo_rao.config.architecture.architecture_fields`.
        vocab_size: rows of the embeddings.
        seq_length: tokens that the network must support, at least.
        carried: config.json that came with the model; keys that do not affect the network are kept.
        location: the file with ``carried``, for messages.

    Raises:
        UserError: transformers rejects a value in ``carried``.
    """
    from transformers import CONFIG_MAPPING

    carried = carried or {}
    longest = carried.get("max_position_embeddings")
    decided = keys_of_network(family)
    values = {
        **{name: value for name, value in carried.items() if name not in decided and name != "auto_map"},
        **config_values(fields, family),
        "architectures": [family.architecture],
        "vocab_size": vocab_size,
        "max_position_embeddings": max(seq_length, longest) if type(longest) is int else seq_length,
    }
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(values)
    except Exception as error:  # whatever its validation raises
        raise UserError(f"{location} is rejected by transformers: {' '.join(str(error).split())[:200]}") from None


def config_values(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Values of config.json for a network: the inverse of :func:`network_fields`."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    experts = "num_experts_per_tok" in family.reads
    ffn = fields["ffn_hidden_size"] or 4 * hidden
    if experts and "moe_intermediate_size" not in family.reads:
        ffn = fields["moe_ffn_hidden_size"] or ffn
    values: dict[str, Any] = {
        "num_hidden_layers": fields["num_layers"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": fields["num_query_groups"] or heads,
        "rms_norm_eps": fields["layernorm_epsilon"],
        "initializer_range": fields["init_method_std"],
        "tie_word_embeddings": bool(fields["share_embeddings_and_output_weights"]),
        "rope_theta": float(fields["rotary_base"]),
    }
    kv_channels = fields["kv_channels"] or hidden // heads
    # Some config classes always have it, others only if it does not follow from the sizes.
    if family.model_type not in ("mistral", "qwen2") or kv_channels * heads != hidden:
        values["head_dim"] = kv_channels
    if (scaling := fields.get("rope_scaling")) is not None:
        values["rope_scaling"] = {"rope_type": "llama3", **scaling}
    elif "rope_scaling" in family.fixed:
        values["rope_scaling"] = dict(family.fixed["rope_scaling"][0])
    if family.has_windows:
        values["sliding_window"] = None if fields["window_size"] is None else fields["window_size"][0] + 1
    if experts:
        name = "num_experts" if "num_experts" in family.reads else "num_local_experts"
        values[name] = fields["num_moe_experts"]
        values["num_experts_per_tok"] = fields["moe_router_topk"]
    if "moe_intermediate_size" in family.reads:
        values["norm_topk_prob"] = not fields["moe_router_pre_softmax"]
        values["moe_intermediate_size"] = fields["moe_ffn_hidden_size"] or ffn
    if "query_pre_attn_scalar" in family.reads:
        scalar = fields["softmax_scale"] ** -2
        values["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
        values["rope_local_base_freq"] = float(fields["rotary_base_local"])
    return values


# Fields that only affect the rounding of a forward pass.
_ROUNDING = (
    "attention_softmax_in_fp32",
    "apply_query_key_layer_scaling",
    "fp32_residual_connection",
    "moe_router_dtype",
)


def check_expressible(fields: Mapping[str, Any], family: Family, location: str) -> None:
    """Check that config.json can express the network. Imports megatron.

    Raises:
        UserError: it cannot; the message names the field and its value.
    """
    from nemo_rao.mcore.network import NO_EFFECT

    expressed = {*_ALWAYS, "layernorm_epsilon", "init_method_std", "vocab_size", *_ROUNDING}
    if family.rope_type == "llama3":
        expressed.add("rope_scaling")
    if family.has_windows:
        expressed.add("window_size")
    if "num_experts_per_tok" in family.reads:
        expressed |= {"num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"}
    if "norm_topk_prob" in family.reads:
        expressed.add("moe_router_pre_softmax")
    if "query_pre_attn_scalar" in family.reads:
        expressed |= {"softmax_scale", "rotary_base_local"}
    usual = family.network.fields
    for name, value in fields.items():
        if name not in expressed and name not in NO_EFFECT and not _same(value, usual.get(name)):
            raise UserError(
                f"{location}: {name}={value} cannot be exported: config.json of {family.architecture} cannot express "
                f"it (its models have {usual.get(name)})"
            )
