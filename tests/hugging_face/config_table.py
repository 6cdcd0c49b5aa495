"""Keys and defaults of the families' config classes, as the installed transformers writes them to config.json.

``transformers_4.json`` and ``transformers_5.json`` are this script's output under releases of both kinds (4.57 and
5.12): a virtual environment with transformers alone suffices.

    python tests/hugging_face/config_table.py > tests/hugging_face/transformers_5.json
"""

from __future__ import annotations

import json
from typing import Any

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def table() -> dict[str, dict[str, Any]]:
    """Model type -> config.json with all keys, of a small model."""
    from transformers import CONFIG_MAPPING

    found = {}
    for family, architecture in ARCHITECTURES.items():
        config = CONFIG_MAPPING[family](architectures=[architecture], **SIZES)
        found[family] = json.loads(config.to_json_string(use_diff=False))
    return found


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
