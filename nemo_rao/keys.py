"""Typed configuration keys: every key has its default, its range and its comment in one place.

A config is a plain dataclass whose fields are made by :func:`key`. The recipe system reads the same metadata to
check a user's value, to print a recipe with its comments, and to name the nearest known key.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class KeySpec:
    """What a key accepts, and the comment printed beside it. Bounds are inclusive unless ``exclusive``."""

    comment: str
    low: float | None = None
    high: float | None = None
    exclusive: bool = False
    choices: tuple[Any, ...] | None = None


def key(
    default: Any,
    comment: str,
    *,
    low: float | None = None,
    high: float | None = None,
    exclusive: bool = False,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A dataclass field with a default, a comment and the values it allows.

    Args:
        default: the key's only default. Lists and dicts are copied for every instance.
        comment: what the key does, with its unit.
        low, high: bounds of a number; a list is checked element by element.
        exclusive: the bounds themselves are not allowed.
        choices: the allowed values, where they can be listed.
    """
    spec = KeySpec(comment, low, high, exclusive, tuple(choices) if choices is not None else None)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"key": spec})
    return dataclasses.field(default=default, metadata={"key": spec})
