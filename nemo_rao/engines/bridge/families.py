"""Megatron-Bridge's families on layers without Transformer Engine: which can be built of them, and of what parts."""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gemma.gemma3_provider import Gemma3ModelProvider, gemma3_layer_spec
from megatron.bridge.models.gpt_provider import GPTModelProvider, default_layer_spec
from megatron.bridge.models.mistral.mistral_provider import MistralModelProvider

from nemo_rao.engines.bridge import mixtral
from nemo_rao.errors import UserError
from nemo_rao.mcore.attention import LocalLayers
from nemo_rao.mcore.layer_spec import Parts

_USUAL = (GPTModelProvider, MistralModelProvider)
# Our layers, by the names by which Bridge recognizes how a module's weights are split over tensor-parallel ranks.
_SPLIT = {"SegmentAttention": "column", "RowParallelLinearLayerNorm": "row", "Norm": "replicated"}


def register_families() -> None:
    """Let Bridge convert models of our layers, and the families that it lacks. Safe to call more than once."""
    for name, split in _SPLIT.items():
        AutoMapping.register_module_type(name, split)
    mixtral.register()


def parts_of(provider: Any, family: str) -> Parts:
    """What a model of Bridge's ``provider`` has beside what its fields say.

    Args:
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
        f"{family}: Megatron-Bridge builds its layers with Transformer Engine alone, which needs a GPU; convert and "
        "train it there, or choose another model"
    )
