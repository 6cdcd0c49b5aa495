"""The models that can be converted, and their weights' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_rao.config.engine_choice import BRIDGE, NEMO

_GPT = "nemo.collections.llm.gpt.model."


@dataclass(frozen=True)
class NemoNames:
    """What NeMo calls a family.

    Attributes:
        module: where NeMo has its configs.
        model_class: of ``nemo.collections.llm``, for a model of any size.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are normed.
    """

    module: str
    model_class: str
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of model that can be converted, and what is particular about its config.json.

    Attributes:
        architecture, model_type: its names in config.json.
        nemo: what NeMo calls it; ``None``: it is converted by Megatron-Bridge alone.
        reads: keys that decide its network, beside those of a Llama.
        fixed: key -> the only values that can be converted, beside those of all families or in their place.
        unused: keys that its network does not read.
        period: every ``period``-th layer is global, the others see ``sliding_window`` tokens; 1: all layers do where
            it is set; 0: there is no window.
        scaling: the one way of scaling rotary embeddings that it has.
    """

    architecture: str
    model_type: str
    nemo: NemoNames | None = None
    reads: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    period: int = 0
    scaling: str | None = None

    @property
    def of_nemo(self) -> NemoNames:
        """``nemo``, of a family that NeMo converts."""
        assert self.nemo is not None, f"{self.architecture} is converted by Megatron-Bridge alone"
        return self.nemo


_EXPERTS = ("num_local_experts", "num_experts_per_tok")
# These networks have a window only with use_sliding_window, which is refused.
_UNUSED_WINDOW = ("sliding_window", "max_window_layers")

FAMILIES = (
    Family("LlamaForCausalLM", "llama", NemoNames(_GPT + "llama", "LlamaModel"), scaling="llama3"),
    Family("MistralForCausalLM", "mistral", NemoNames(_GPT + "mistral", "MistralModel"), period=1),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        NemoNames(_GPT + "qwen2", "Qwen2Model", qkv_bias=True),
        unused=_UNUSED_WINDOW,
    ),
    Family("Qwen3ForCausalLM", "qwen3", NemoNames(_GPT + "qwen3", "Qwen3Model", qk_norm=True), unused=_UNUSED_WINDOW),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        reads=("num_experts", *_EXPERTS, "moe_intermediate_size", "norm_topk_prob"),
        fixed={"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
        unused=_UNUSED_WINDOW,
    ),
    Family("MixtralForCausalLM", "mixtral", reads=_EXPERTS, fixed={"router_jitter_noise": (None, 0)}, period=1),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        reads=("query_pre_attn_scalar", "rope_local_base_freq"),
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "sliding_window_pattern": (None, 6),
            "_sliding_window_pattern": (None, 6),
        },
        period=6,
    ),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        reads=_EXPERTS,
        fixed={
            "attention_bias": (True,),
            "swiglu_limit": (None, 7),
            # Megatron-Bridge takes these as given.
            "rope_scaling": (
                {
                    "rope_type": "yarn",
                    "factor": 32,
                    "original_max_position_embeddings": 4096,
                    "beta_fast": 32,
                    "beta_slow": 1,
                    "truncate": False,
                },
            ),
            "tie_word_embeddings": (None, False),
        },
        unused=("experts_per_token", "initial_context_length"),  # say again what other keys say
        period=2,
        scaling="yarn",
    ),
)
SUPPORTED = ", ".join(family.architecture for family in FAMILIES if family.nemo is not None)


def families_of(engine: str) -> tuple[Family, ...]:
    """The families that an engine converts."""
    assert engine in (NEMO, BRIDGE), engine
    return tuple(family for family in FAMILIES if engine == BRIDGE or family.nemo is not None)


# Hugging Face's and Megatron's names of Qwen2's biases, each of one layer.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

# Those of Qwen3's norms of queries and keys.
QK_NORMS = {
    f"model.layers.*.self_attn.{name}_norm.weight": f"decoder.layers.*.self_attention.{name}_layernorm.weight"
    for name in "qk"
}

# What a tokenizer consists of, besides config.json, which tells its class where tokenizer_config.json does not.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
