"""docs/reference/keys.md: every key of a run, from its declaration in the code."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from nemo_rao.config.model_config import ModelKeys
from nemo_rao.config.recipe_text import limits, shown
from nemo_rao.config.run_config import RunConfig

_BEFORE = """\
# Keys

This page lists every key of a run with its default. [Recipes](../guides/recipes.md) override some of the defaults, and
`key=value` on the command line overrides both. `nemo-rao train --config-name RECIPE --print-config` prints the
resulting values. `null` means "not set", and a single text is accepted where the type is a list of text. Unknown keys
and invalid values are refused before anything heavy is imported.

[Objectives](objectives.md) lists the keys of the objectives, `model.NAME.KEY`, and
[Clusters](../guides/clusters.md#a-clusters-file) those of a cluster file. This page is generated from the code by
`python -m docs_pages`.
"""
_NAMES = {int: "integer", float: "number", bool: "true, false", str: "text", type(None): "null", Any: "anything"}


def page() -> str:
    lines = [_BEFORE]
    for field in dataclasses.fields(RunConfig):
        lines += _section(field.name, _type(RunConfig, field.name), field.metadata["key"].comment)
    return "\n".join(lines)


def _section(prefix: str, config_type: type, comment: str) -> Iterator[str]:
    """A heading and a table, then the groups below it."""
    if prefix == "model":
        config_type = ModelKeys  # without the objectives' blocks
    yield f"{'#' * (prefix.count('.') + 2)} {prefix}\n"
    yield f"{comment[0].upper()}{comment[1:]}.\n"
    fields = dataclasses.fields(config_type)
    groups = [field for field in fields if dataclasses.is_dataclass(_type(config_type, field.name))]
    if len(groups) < len(fields):
        yield "| key | default | type | meaning |\n|---|---|---|---|"
    for field in fields:
        if field not in groups:
            default = getattr(config_type(), field.name)
            spec, allowed = field.metadata["key"], limits(field.metadata["key"]).strip(" []")
            kind = (
                allowed
                if spec.choices
                else _words(_type(config_type, field.name)) + (f", {allowed}" if allowed else "")
            )
            yield _row(f"`{field.name}`", f"`{shown(default)}`", kind, spec.comment)
    yield ""
    for group in groups:
        yield from _section(f"{prefix}.{group.name}", _type(config_type, group.name), group.metadata["key"].comment)


def _type(config_type: type, name: str) -> Any:
    return typing.get_type_hints(config_type)[name]


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is dict:
        return f"mapping to {_words(arguments[1])}"
    return _NAMES[hint]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
