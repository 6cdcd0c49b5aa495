"""A tiny model of each family, of random weights, made by transformers from the family's config class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCAB = 90
# Two kinds of token more than Llama's head size would give: 12 channels, 4 heads, 32 hidden units.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Family, and what is particular about it -> arguments of its config class. Windows are shorter than the test's rows.
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.x: scaled rotary embedding, tied": {
        "model_type": "llama",
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
    "Qwen2.5: biases of queries, keys and values": {"model_type": "qwen2", "head_dim": None},
    "Qwen3: norms of queries and keys": {"model_type": "qwen3"},
    "Qwen3-MoE": {**_QWEN3_MOE, "norm_topk_prob": True},
    "Qwen3-MoE: weights of experts before the choice": {**_QWEN3_MOE, "norm_topk_prob": False},
    "Gemma 3 (text): local and global layers": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "query_pre_attn_scalar": 20,
        "tie_word_embeddings": True,
    },
    "Mistral: sliding windows": {"model_type": "mistral", "sliding_window": 8},
    "Mixtral": {"model_type": "mixtral", "sliding_window": None, **_EXPERTS},
    "gpt-oss: attention sinks, experts with biases": {"model_type": "gpt_oss", "sliding_window": 8, **_EXPERTS},
}


def make_model(name: str, folder: Path, **changed: Any) -> Any:
    """Save a model in which every tensor matters, norms, biases and sinks too; returns it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    given = {**SIZES, **MODELS[name], **changed}
    kept = {key: value for key, value in given.items() if value is not None or key == "sliding_window"}
    torch.manual_seed(len(name))
    config = CONFIG_MAPPING[kept.pop("model_type")](**kept)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("norm", "bias", "sinks")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model
