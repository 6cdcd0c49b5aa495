"""The network that a recipe describes, in Megatron's terms: its family's fields with the recipe's sizes in their place.

A recipe written before there were families names a class of NeMo, ``model.config_class``. Only NeMo's engine knows
these, so it is asked; it is imported by its name then, and by nothing else here.
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
    """Field -> value of the network, by the names of :mod:`nemo_rao.config.families`; ``None``: not set.

    Raises:
        UserError: ``model.config_class`` does not exist.
    """
    return _network(config)[1]


def family_of(config: RunConfig) -> str | None:
    """The network's family; ``None`` for a class of NeMo that belongs to none.

    Raises:
        UserError: see :func:`architecture_fields`.
    """
    return _network(config)[0]


def given_fields(config: RunConfig) -> dict[str, Any]:
    """The fields that the recipe sets in ``model.arch``, ``extra`` included."""
    given = {name: value for name, value in dataclasses.asdict(config.model.arch).items() if value is not None}
    scaling, extra = given.pop("rope_scaling"), given.pop("extra")
    return {**given, **({} if scaling["factor"] is None else {"rope_scaling": scaling}), **extra}


def _network(config: RunConfig) -> tuple[str | None, dict[str, Any]]:
    name, given = config.model.family, given_fields(config)
    if (old := config.model.config_class) is not None:
        return importlib.import_module("nemo_rao.engines.nemo.config_classes").fields_of_class(old, given)
    return name, {**dict.fromkeys(SIZES), **FAMILIES[name].fields, **given}


def network_key(config: RunConfig) -> str:
    """The key that names the network's kind, with its value, for messages."""
    keys = config.model
    return f"model.family={keys.family}" if keys.config_class is None else f"model.config_class={keys.config_class}"


def check_family(config: RunConfig) -> None:
    """Checks that a model of the recipe's family is described in full.

    Raises:
        UserError: a size that no family has is missing, or the family has no rotary scaling.
    """
    keys = config.model
    if keys.config_class is not None:
        return
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(keys.arch, name) is None:
            raise UserError(
                f"model.arch.{name} is null; set the sizes of a model of {network_key(config)}, or choose a file that "
                "has them, such as model=llama3_8b"
            )
    if keys.arch.rope_scaling.factor is not None and not FAMILIES[keys.family].scales_rope:
        scaled = ", ".join(family.name for family in FAMILIES.values() if family.scales_rope)
        raise UserError(
            f"model.arch.rope_scaling.factor={keys.arch.rope_scaling.factor}: {network_key(config)} has no such "
            f"scaling; set it to null (it belongs to {scaled})"
        )


def warn_of_class(config: RunConfig) -> None:
    """Report a recipe's ``model.config_class`` once, with what to write instead."""
    if config.model.config_class is None:
        return
    try:
        family, fields = _network(config)
    except UserError:
        return  # whatever uses the network says so
    warn_once(f"{network_key(config)} is deprecated; {_replacement(family, fields)}")


def _replacement(family: str | None, fields: Mapping[str, Any]) -> str:
    if family is None:
        return f"no model.family has its network yet (there are {', '.join(FAMILIES)}), so NeMo's class is used"
    usual = {**dict.fromkeys(SIZES), **FAMILIES[family].fields}
    missing = object()
    own = {name: value for name, value in fields.items() if usual.get(name, missing) != value}
    keys = [field.name for field in dataclasses.fields(ArchitectureConfig)]
    arch = {name: own.pop(name) for name in keys if name in own}
    arch |= {"extra": own} if own else {}
    return f"write model.family={family} and model.arch={shown(arch)} instead"


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
