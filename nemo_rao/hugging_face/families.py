"""The models that can be converted, and their weights' names."""

from __future__ import annotations

from dataclasses import dataclass

_GPT = "nemo.collections.llm.gpt.model."


@dataclass(frozen=True)
class Family:
    """A kind of model that can be converted.

    Attributes:
        architecture, model_type: its names in Hugging Face's config.json.
        module: where NeMo has its configs.
        model_class: of ``nemo.collections.llm``, for a model of any size.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are normed.
    """

    architecture: str
    model_type: str
    module: str
    model_class: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = (
    Family("LlamaForCausalLM", "llama", _GPT + "llama", "LlamaModel"),
    Family("MistralForCausalLM", "mistral", _GPT + "mistral", "MistralModel"),
    Family("Qwen2ForCausalLM", "qwen2", _GPT + "qwen2", "Qwen2Model", qkv_bias=True),
    Family("Qwen3ForCausalLM", "qwen3", _GPT + "qwen3", "Qwen3Model", qk_norm=True),
)
SUPPORTED = ", ".join(family.architecture for family in FAMILIES)

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
