"""Megatron-Bridge's model families on layers without Transformer Engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gemma.gemma3_provider import Gemma3ModelProvider, gemma3_layer_spec
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.models.mistral.mistral_provider import MistralModelProvider

from nemo_rao.config.families import BRIDGE_ROPE_SCALING
from nemo_rao.engines.bridge import mixtral
from nemo_rao.errors import UserError
from nemo_rao.mcore.attention import LocalLayers
from nemo_rao.mcore.layer_spec import Parts

_USUAL = (GPTModelProvider, MistralModelProvider)
# Our layers, with the kind of tensor-parallel split that Bridge registers for a class name.
_SPLIT = {
    "SegmentAttention": "column",
    "FlexSegmentAttention": "column",
    "RowParallelLinearLayerNorm": "row",
    "Norm": "replicated",
}


def register_families() -> None:
    """Let Bridge convert models with our layers, and families that it lacks. Idempotent."""
    for name, split in _SPLIT.items():
        AutoMapping.register_module_type(name, split)
    mixtral.register()


def in_bridges_terms(family: str | None, fields: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """Return Bridge's provider class for a network, and its fields.

    Args:
        family: the value of ``model.family``; ``None``: no family.
        fields: see :mod:`nemo_rao.config.families`; ``None`` values are left to Bridge.

    Raises:
        UserError: Bridge does not support this rotary scaling.
    """
    made = {name: value for name, value in fields.items() if value is not None}
    if (scaling := made.pop("rope_scaling", None)) is not None:
        for name, value in BRIDGE_ROPE_SCALING.items():
            if scaling[name] != value:
                raise UserError(
                    f"model.arch.rope_scaling.{name}={scaling[name]}: must be {value}, the value of Megatron-Bridge "
                    "and of published models. Set it to that."
                )
        made |= {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    if family != "gemma3":
        return GPTModelProvider, made
    made["rotary_base"] = made.pop("rotary_base_local"), made["rotary_base"]
    made["window_size"] = made["window_size"][0] + 1  # Bridge includes the current token, like Hugging Face
    made["interleaved_attn_pattern"] = made.pop("window_attn_skip_freq") - 1, 1
    return Gemma3ModelProvider, made


def parts_of(provider: Any, family: str) -> Parts:
    """Return the parts of a model that its fields do not describe.

    Args:
        provider: Bridge's provider of the model.
        family: for messages, such as ``Gemma2ForCausalLM``.

    Raises:
        UserError: its layers need Transformer Engine.
    """
    spec, kind = provider.transformer_layer_spec, type(provider)
    if kind is Gemma3ModelProvider and spec is gemma3_layer_spec:
        local, num_global = provider.interleaved_attn_pattern
        if num_global == 1:
            return Parts(norms_behind=True, local_layers=LocalLayers(provider.window_size - 1, local + 1))
    if kind in _USUAL and spec is default_layer_spec:
        return Parts()
    raise UserError(
        f"{family}: Megatron-Bridge builds its layers only with Transformer Engine, which needs a GPU. Use another "
        "model here."
    )
