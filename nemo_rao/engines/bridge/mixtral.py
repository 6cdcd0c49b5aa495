"""Mixtral for Megatron-Bridge, which lacks this family: names of weights, and sizes."""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.core.models.gpt.gpt_model import GPTModel

ARCHITECTURE = "MixtralForCausalLM"
_LAYER, _HF_LAYER = "decoder.layers.*.", "model.layers.*."
_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    f"{_LAYER}self_attention.linear_qkv.layer_norm_weight": f"{_HF_LAYER}input_layernorm.weight",
    f"{_LAYER}self_attention.linear_proj.weight": f"{_HF_LAYER}self_attn.o_proj.weight",
    f"{_LAYER}pre_mlp_layernorm.weight": f"{_HF_LAYER}post_attention_layernorm.weight",
    f"{_LAYER}mlp.router.weight": f"{_HF_LAYER}block_sparse_moe.gate.weight",
}
# Transformer Engine's grouped experts, and experts that are computed sequentially.
_EXPERTS = ("{}.weight*", "local_experts.*.{}.weight")


class MixtralBridge(MegatronModelBridge):
    """Bridge's description of Mixtral, registered by :func:`register`."""

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """Return Bridge's provider for these sizes."""
        provider = super().provider_bridge(hf_pretrained)
        window = hf_pretrained.config.sliding_window
        provider.normalization = "RMSNorm"
        provider.activation_func = F.silu
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.add_qkv_bias = False
        provider.hidden_dropout = 0.0
        provider.moe_ffn_hidden_size = provider.ffn_hidden_size
        provider.moe_grouped_gemm = True
        provider.moe_token_dispatcher_type = "alltoall"
        # Hugging Face normalizes the chosen experts' part of the softmax over all: the softmax of the chosen ones.
        provider.moe_router_pre_softmax = False
        # Megatron counts the tokens before the current one; Hugging Face includes the current one.
        provider.window_size = None if window is None else (window - 1, 0)
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Map Megatron's names to Hugging Face's."""
        attention, experts = f"{_HF_LAYER}self_attn.", f"{_HF_LAYER}block_sparse_moe.experts.*."
        mappings = [AutoMapping(megatron_param=own, hf_param=theirs) for own, theirs in _NAMES.items()]
        mappings.append(
            QKVMapping(
                megatron_param=f"{_LAYER}self_attention.linear_qkv.weight",
                **{part: f"{attention}{part}_proj.weight" for part in "qkv"},
            )
        )
        for form in _EXPERTS:
            own = f"{_LAYER}mlp.experts.{form}"
            gate_and_up = {"gate": f"{experts}w1.weight", "up": f"{experts}w3.weight"}
            mappings.append(GatedMLPMapping(megatron_param=own.format("linear_fc1"), **gate_and_up))
            mappings.append(AutoMapping(megatron_param=own.format("linear_fc2"), hf_param=f"{experts}w2.weight"))
        return MegatronMappingRegistry(*mappings)


def register() -> None:
    """Register the family with ``AutoBridge``, unless the installed release has it."""
    from megatron.bridge import AutoBridge

    if ARCHITECTURE not in AutoBridge.list_supported_models():
        # The class itself: given a name, Bridge would look for a model with custom code.
        source = importlib.import_module("transformers").MixtralForCausalLM
        MegatronModelBridge.register_bridge(source=source, target=GPTModel, model_type="mixtral")(MixtralBridge)
