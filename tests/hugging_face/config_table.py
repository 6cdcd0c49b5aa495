"""Keys and defaults of the families' config classes, as the installed transformers writes them to config.json.

``transformers_5.json`` is this script's output under transformers 5.24, and for Qwen3 under 5.12 (a virtual environment
with transformers alone suffices), as the project itself runs on 4:

    pip install 'transformers>=5' && python tests/hugging_face/config_table.py > tests/hugging_face/transformers_5.json
"""

from __future__ import annotations

import json
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
ARCHITECTURES = {family: f"{family.capitalize()}ForCausalLM" for family in FAMILIES}


def table() -> dict[str, dict[str, Any]]:
    """Model type -> config.json with all keys, of a small model."""
    from transformers import CONFIG_MAPPING

    found = {}
    for family in FAMILIES:
        config = CONFIG_MAPPING[family](architectures=[ARCHITECTURES[family]], **SIZES)
        found[family] = json.loads(config.to_json_string(use_diff=False))
    return found


if __name__ == "__main__":
    print(json.dumps(table(), indent=1))
