"""The sizes of a run's network, without an import of NeMo."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.nemo_classes import config_fields
from nemo_rao.config.run_config import RunConfig


def architecture_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of ``model.config_class`` with the recipe's own in their place.

    Raises:
        UserError: there is no such class.
    """
    own = {name: value for name, value in dataclasses.asdict(config.model.arch).items() if value is not None}
    extra = own.pop("extra")
    return {**config_fields(config.model.config_class), **own, **extra}


def num_tokens(tokenizer: str | None) -> int | None:
    """Tokens of a tokenizer's folder; ``None`` for one that is not on this machine under that name."""
    file = Path(os.path.expanduser(tokenizer or "")) / "tokenizer.json"
    return len(vocabulary(file)) if tokenizer is not None and file.is_file() else None


def vocabulary(file: Path) -> dict[str, int]:
    """Token -> id of a ``tokenizer.json``, added tokens included."""
    from tokenizers import Tokenizer  # what `transformers` reads it with; importing that takes seconds

    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)


def approximate_parameters(fields: Mapping[str, Any], vocab_size: int) -> int:
    """Weights of a GPT with these fields of Megatron's config, without norms and biases; 0 where a size is unknown."""

    def size(name: str, default: int = 0) -> int:
        value = fields.get(name)
        return value if isinstance(value, int) else default

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if not (hidden and heads):
        return 0
    head = size("kv_channels", hidden // heads)
    attention = 2 * hidden * head * (heads + size("num_query_groups", heads))
    ffn, experts = size("ffn_hidden_size", 4 * hidden), size("num_moe_experts")
    if experts:
        ffn = size("moe_ffn_hidden_size", ffn)
    feed_forward = (3 if fields.get("gated_linear_unit") else 2) * hidden * ffn * max(1, experts)
    embeddings = (1 if fields.get("share_embeddings_and_output_weights") else 2) * vocab_size * hidden
    return size("num_layers") * (attention + feed_forward) + embeddings
