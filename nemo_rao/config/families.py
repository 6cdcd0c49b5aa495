"""Model families as fields of Megatron's config: what all sizes of a family have in common.

A recipe sets a family (``model.family``) and the sizes of one of its models (``model.arch``). Planning, checks and both
engines read this table; each engine converts the fields to its own config.

Field names are those of Megatron's ``TransformerConfig``. The others are arguments of its ``GPTModel``
(``position_embedding_type``, ``rotary_base``, ``rotary_percent``, ``vocab_size``,
``share_embeddings_and_output_weights``), arguments of the engines (``make_vocab_size_divisible_by``), or defined here:

    activation_func    a name, see :data:`ACTIVATIONS`
    rope_scaling       ``None``, or the fields of :class:`nemo_rao.config.model_config.RopeScalingConfig`
    rotary_base_local  base of the rotary embedding in sliding-window layers; ``rotary_base`` is that of the others

Load-balancing losses are absent, because every run disables them (:mod:`nemo_rao.mcore.loss`). So are number formats
and kernels, which are not part of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# silu: x sigmoid(x). gelu_tanh: GELU in its tanh form. quick_gelu: x sigmoid(1.702 x).
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu")

# Sizes for which families have no default.
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")

# Defaults of all families. None: Megatron derives the value, or the model has no such part.
_DECODER: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "kv_channels": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "position_embedding_type": "rope",
    "rotary_base": 10000.0,
    "rotary_percent": 1.0,
    "rope_scaling": None,
    "window_size": None,
    "window_attn_skip_freq": None,
    "share_embeddings_and_output_weights": False,
    "vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "init_method_std": 0.02,
    "num_moe_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
}


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Attributes:
        name: the value of ``model.family``.
        model_type: ``model_type`` in Hugging Face's config.json.
        own: fields that differ from the defaults of all families, see :attr:`fields`.
        parts: what its layers have in addition to those of Megatron's GPT, for messages.
        scales_rope: ``model.arch.rope_scaling`` may be set.
    """

    name: str
    model_type: str
    own: Mapping[str, Any]
    parts: tuple[str, ...] = ()
    scales_rope: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Field -> value: the defaults of all families, overridden by those of this one."""
        return {**_DECODER, **self.own}


_MIXTURE = {"num_moe_experts": 8, "moe_router_topk": 2}
_QWEN = {"layernorm_epsilon": 1e-6, "rotary_base": 1e6}
_QWEN3 = {**_QWEN, "qk_layernorm": True, "kv_channels": 128}

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama", {}, scales_rope=True),
        Family("mistral", "mistral", {}),
        # Routing weights are a softmax over the selected experts only.
        Family("mixtral", "mixtral", {**_MIXTURE, "rotary_base": 1e6}),
        Family("qwen2", "qwen2", {**_QWEN, "add_qkv_bias": True}),
        Family("qwen3", "qwen3", _QWEN3),
        # With norm_topk_prob, as in Mixtral. Models without it set moe_router_pre_softmax.
        Family("qwen3_moe", "qwen3_moe", {**_QWEN3, "num_moe_experts": 128, "moe_router_topk": 8}),
        Family(
            "gemma3",
            "gemma3_text",
            {
                "layernorm_epsilon": 1e-6,
                "layernorm_zero_centered_gamma": True,
                "qk_layernorm": True,
                "activation_func": "gelu_tanh",
                "kv_channels": 256,
                "softmax_scale": 256**-0.5,
                "rotary_base": 1e6,
                "rotary_base_local": 10000.0,
                # The 511 tokens before the current one, a window of 512; every sixth layer attends to all.
                "window_size": (511, 0),
                "window_attn_skip_freq": 6,
                "share_embeddings_and_output_weights": True,
            },
            parts=("norms after attention and feed-forward layers", "scaled embeddings", "two rotary embeddings"),
        ),
        Family(
            "gpt_oss",
            "gpt_oss",
            {
                "add_bias_linear": True,
                "activation_func": "quick_gelu",
                "activation_func_clamp_value": 7.0,
                "glu_linear_offset": 1.0,
                "kv_channels": 64,
                "softmax_type": "learnable",
                "window_size": (127, 0),
                "window_attn_skip_freq": 2,
                "position_embedding_type": "yarn",
                "rotary_base": 150000.0,
                "yarn_rotary_scaling_factor": 32.0,
                "yarn_original_max_position_embeddings": 4096,
                "yarn_beta_fast": 32.0,
                "yarn_beta_slow": 1.0,
                "yarn_correction_range_round_to_int": False,
                "num_moe_experts": 32,
                "moe_router_topk": 4,
            },
            parts=("learned attention sinks", "YaRN", "experts with biases"),
        ),
    )
}


def family_of_model_type(model_type: str) -> Family | None:
    """The family with this ``model_type`` of Hugging Face; ``None`` if there is none."""
    return next((family for family in FAMILIES.values() if family.model_type == model_type), None)


# Llama 3's rotary scaling in Megatron-Bridge, which accepts only the factor and fixes these values.
BRIDGE_ROPE_SCALING = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
