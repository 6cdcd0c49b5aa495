"""Use of NeMo's connectors.

Weights are converted by NeMo's own connectors (``HFLlamaImporter``, ``HFLlamaExporter``). NeMo has such a pair for each
family, but they map the same names, except for Qwen2's biases and Qwen3's norms of queries and keys, and only Llama's
handles tied embeddings. Llama's pair is therefore used for all families, with NeMo's additional transforms of the
others. NeMo's translation of configs is not used: it unties Qwen2, takes Mistral's attention window for its length,
drops factors of Llama 3.1's rotary scaling, exports the training length as the maximum length, and unpickles a
checkpoint's context on export.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nemo_rao.runtime.console import quiet_third_parties, say

# Names of Qwen2's biases in Hugging Face and Megatron.
HF_BIASES = tuple(f"model.layers.*.self_attn.{name}_proj.bias" for name in "qkv")
MEGATRON_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"

# Names of Qwen3's norms of queries and keys: Hugging Face -> Megatron.
QK_NORMS = {
    f"model.layers.*.self_attn.{name}_norm.weight": f"decoder.layers.*.self_attention.{name}_layernorm.weight"
    for name in "qk"
}


class Weights:
    """Tensors by name, with the interface of a model that NeMo's connectors expect.

    ``config`` has the sizes for splitting fused queries, keys and values: ``num_attention_heads``,
    ``num_query_groups``, ``kv_channels``.
    """

    def __init__(self, tensors: Mapping[str, Any], config: SimpleNamespace) -> None:
        self._tensors = dict(tensors)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors)


def import_nemo() -> None:
    """Import NeMo with a progress message, and silence its routine messages."""
    from nemo_rao.engines.nemo import engine

    if "nemo.collections.llm" not in sys.modules:
        say("importing NeMo, which takes about 20 seconds")
    engine.load()
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    quiet_third_parties()
