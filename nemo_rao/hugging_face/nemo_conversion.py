"""How NeMo's connectors are used.

Weights are converted by NeMo's own connectors (``HFLlamaImporter``, ``HFLlamaExporter``). NeMo has such a pair for each
family, but they map the same names, except for Qwen2's biases and Qwen3's norms of queries and keys, and Llama's alone
knows tied embeddings: so Llama's serves all families, and NeMo's transforms of the others are added. NeMo's translation
of configs is not used: it unties Qwen2, takes Mistral's attention window for its length, drops factors of Llama 3.1's
rotary scaling, exports the length that was trained on for the longest possible one, and to export it unpickles a
checkpoint's context.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nemo_rao.runtime.console import quiet_third_parties, say

# Hugging Face's and Megatron's names of Qwen2's biases, each of one layer.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

# Those of Qwen3's norms of queries and keys.
QK_NORMS = {
    f"model.layers.*.self_attn.{name}_norm.weight": f"decoder.layers.*.self_attention.{name}_layernorm.weight"
    for name in "qk"
}


class Weights:
    """Tensors by name, in the form in which NeMo's connectors take a model that is none.

    ``config`` has what splits fused queries, keys and values: ``num_attention_heads``, ``num_query_groups``,
    ``kv_channels``.
    """

    def __init__(self, tensors: Mapping[str, Any], config: SimpleNamespace) -> None:
        self._tensors = dict(tensors)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors)


def import_nemo() -> None:
    """Import NeMo, reporting that it takes a while, and silence its own routine messages."""
    from nemo_rao.engines.nemo import engine

    if "nemo.collections.llm" not in sys.modules:
        say("importing NeMo, which takes about 20 seconds")
    engine.load()
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    quiet_third_parties()
