"""Typed configuration keys: every key has its default, its range and its comment in one place.

A config is a plain dataclass whose fields are made by :func:`key`. The recipe system reads the same metadata to
check a user's value, to print a recipe with its comments, and to name the nearest known key.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_rao.errors import UserError


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


def section(config_type: type, comment: str) -> Any:
    """A group of keys as a field of the group above it."""
    return dataclasses.field(default_factory=config_type, metadata={"key": KeySpec(comment)})


def check(config: Any, prefix: str = "") -> None:
    """Refuse a config with a value of another type than its field's, out of its range, or not finite.

    Args:
        config: an instance of a dataclass; fields that are dataclasses themselves are checked alike. A whole number
            passes as a float; ``True`` and ``False`` pass as ``bool`` alone.
        prefix: the dotted name of ``config``, such as ``model.rao``, for the message.

    Raises:
        UserError: the first such key by its full name, its value, and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value, hint = getattr(config, field.name), hints[field.name]
        spec = field.metadata.get("key", KeySpec(""))
        comment = f" ({spec.comment})" if spec.comment else ""
        if not _is_instance(value, hint):
            raise UserError(f"{name}={value!r}: must be {_describe(hint)}{comment}")
        if dataclasses.is_dataclass(value):
            check(value, name)
            continue
        for item in value if isinstance(value, (list, tuple)) else (value,):
            for allowed in _violations(item, spec):
                raise UserError(f"{name}={value!r}: must be {allowed}{comment}")


def _violations(value: Any, spec: KeySpec) -> Iterator[str]:
    """What ``value`` should have been, where it is not."""
    if spec.choices is not None and value not in spec.choices:
        yield f"one of {', '.join('null' if choice is None else repr(choice) for choice in spec.choices)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        yield "finite"
    if spec.low is not None and (value < spec.low or (spec.exclusive and value == spec.low)):
        yield f"{'>' if spec.exclusive else '>='} {spec.low:g}"
    if spec.high is not None and (value > spec.high or (spec.exclusive and value == spec.high)):
        yield f"{'<' if spec.exclusive else '<='} {spec.high:g}"


def _is_instance(value: Any, hint: Any) -> bool:
    """``isinstance`` for the type hints that configs use."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_instance(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return isinstance(value, origin) and all(_is_instance(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(_is_instance, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_instance(name, arguments[0]) and _is_instance(item, arguments[1]) for name, item in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _describe(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"a list, each item {_describe(arguments[0])}"
    if origin is dict:
        return f"a dictionary, each value {_describe(arguments[1])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint) or ("anything" if hint is Any else hint.__name__)
