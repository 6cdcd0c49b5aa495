"""A recipe's network as fields of Megatron's config: its family's fields, overridden by ``model.arch``.

Recipes that predate families name a class of NeMo, ``model.config_class``. Only NeMo's engine can resolve it, so that
engine is imported, by name, for such recipes only.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.families import FAMILIES, SIZES
from nemo_rao.config.model_config import ArchitectureConfig
from nemo_rao.config.recipe_text import shown
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.runtime.console import warn_once


def architecture_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of the network and their values, named as in :mod:`nemo_rao.config.families`; ``None``: not set.

    Raises:
        UserError: ``model.config_class`` does not exist.
    """
    return _network(config)[1]


def family_of(config: RunConfig) -> str | None:
    """The network's family; ``None`` for a NeMo class that belongs to no family.

    Raises:
        UserError: see :func:`architecture_fields`.
    """
    return _network(config)[0]


def given_fields(config: RunConfig) -> dict[str, Any]:
    """The fields set in ``model.arch``, ``extra`` included."""
    given = {name: value for name, value in dataclasses.asdict(config.model.arch).items() if value is not None}
    scaling, extra = given.pop("rope_scaling"), given.pop("extra")
    return {**given, **({} if scaling["factor"] is None else {"rope_scaling": scaling}), **extra}


def _network(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    name, given = config.model.family, given_fields(config)
    if (old := config.model.config_class) is not None:
        return importlib.import_module("nemo_rao.engines.nemo.config_classes").fields_of_class(old, given)
    return name, {**dict.fromkeys(SIZES), **FAMILIES[name].fields, **given}


def network_key(config: RunConfig) -> str:
    """The key that selects the network, with its value, for messages."""
    keys = config.model
    return f"model.family={keys.family}" if keys.config_class is None else f"model.config_class={keys.config_class}"


def check_family(config: RunConfig) -> None:
    """Check that the sizes without a family default are set, and that the family supports the rotary scaling.

    Raises:
        UserError: on the first violated rule.
    """
    keys = config.model
    if keys.config_class is not None:
        return
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(keys.arch, name) is None:
            raise UserError(
                f"model.arch.{name} is null, and {network_key(config)} has no default for it; set it, or choose a file "
                "with all sizes, such as model=llama3_8b"
            )
    if keys.arch.rope_scaling.factor is not None and not FAMILIES[keys.family].scales_rope:
        scaled = ", ".join(family.name for family in FAMILIES.values() if family.scales_rope)
        raise UserError(
            f"model.arch.rope_scaling.factor={keys.arch.rope_scaling.factor}: {network_key(config)} does not "
            f"support RoPE scaling; set it to null (supported by {scaled})"
        )


def warn_of_class(config: RunConfig) -> None:
    """Warn once that ``model.config_class`` is deprecated, with its replacement."""
    if config.model.config_class is None:
        return
    try:
        family, fields = _network(config)
    except UserError:
        return  # raised again wherever the network is used
    warn_once(f"{network_key(config)} is deprecated; {_replacement(family, fields)}")


def _replacement(family: str | None, fields: Mapping[str, Any]) -> str:
    if family is None:
        return f"no model.family describes its network yet (available: {', '.join(FAMILIES)}), so NeMo's class is used"
    usual = {**dict.fromkeys(SIZES), **FAMILIES[family].fields}
    missing = object()
    own = {name: value for name, value in fields.items() if usual.get(name, missing) != value}
    keys = [field.name for field in dataclasses.fields(ArchitectureConfig)]
    arch = {name: own.pop(name) for name in keys if name in own}
    arch |= {"extra": own} if own else {}
    return f"write model.family={family} and model.arch={shown(arch)} instead"


def num_tokens(tokenizer: str | None) -> int | None:
    """Vocabulary size of a tokenizer; ``None`` unless it is a local directory with a ``tokenizer.json``."""
    file = Path(os.path.expanduser(tokenizer or "")) / "tokenizer.json"
    return len(vocabulary(file)) if tokenizer is not None and file.is_file() else None


def vocabulary(file: Path) -> dict[str, int]:
    """Token -> id of a ``tokenizer.json``, added tokens included."""
    from tokenizers import Tokenizer  # `transformers` reads it with this, but takes seconds to import

    return Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)


def approximate_parameters(fields: Mapping[str, Any], vocab_size: int) -> int:
    """Number of weights of a GPT with these Megatron fields, without norms and biases; 0 if a size is unknown."""

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
