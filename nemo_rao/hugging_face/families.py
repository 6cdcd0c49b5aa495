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
        config_class, model_class: of ``nemo.collections.llm``, for a model of any size.
        qkv_bias: queries, keys and values have biases.
    """

    architecture: str
    model_type: str
    module: str
    config_class: str
    model_class: str
    qkv_bias: bool = False


FAMILIES = (
    Family("LlamaForCausalLM", "llama", _GPT + "llama", "LlamaConfig", "LlamaModel"),
    Family("MistralForCausalLM", "mistral", _GPT + "mistral", "MistralConfig7B", "MistralModel"),
    Family("Qwen2ForCausalLM", "qwen2", _GPT + "qwen2", "Qwen2Config", "Qwen2Model", qkv_bias=True),
)
SUPPORTED = ", ".join(family.architecture for family in FAMILIES)

# Hugging Face's and Megatron's names of Qwen2's biases, each of one layer.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

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
