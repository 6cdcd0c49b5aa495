"""Typed configuration keys: every key has its default, its range and its comment in one place.

A config is a plain dataclass whose fields are made by :func:`key`: recipes, objectives, clusters, judges, studies and
options of commands. :func:`make` builds one from a mapping, :func:`check` checks one that exists; both report the first
error as ``KEY=VALUE: must be ALLOWED (COMMENT)``, or ``unknown key KEY; did you mean NEAREST?``.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from nemo_rao.errors import UserError, did_you_mean

Config = TypeVar("Config")


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


def make(
    config_type: type[Config], values: Mapping[str, Any], prefix: str = "", *, numbers_as_text: bool = False
) -> Config:
    """An instance of a config class with these keys set.

    Types are strict, except that integers are converted to floats, lists to tuples and a text to a list of one text
    where the field's type says so: ``True`` and ``"3"`` are not numbers, and a set has no order.

    Args:
        config_type: a dataclass; fields that are dataclasses themselves take mappings.
        values: key -> value, as YAML has them.
        prefix: the dotted name of the config, such as ``model.rao``, for messages.
        numbers_as_text: also convert numbers where text is expected, such as an account that is called 1234.

    Raises:
        UserError: the first unknown key, with the nearest known one; or else the first key with an invalid value.
    """
    values = _text_as_list(config_type, values)
    return _instance(config_type, _validated(config_type, values, prefix, numbers_as_text))


def _text_as_list(config_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with a text that is given where a list of texts is expected made a list."""
    hints, converted = type_hints(config_type), dict(values)
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            converted[name] = _text_as_list(typing.cast(type, hint), value)
        elif hint == list[str] and isinstance(value, str):
            converted[name] = [value]
    return converted


def check(config: Any, prefix: str = "") -> None:
    """Refuse a config with a value of another type than its field's, out of its range, or not finite.

    Args:
        config: an instance of a dataclass; fields that are dataclasses themselves are checked alike.
        prefix: the dotted name of ``config``, such as ``model.rao``, for the message.

    Raises:
        UserError: the first such key by its full name, its value, and what is allowed.
    """
    _validated(type(config), _as_dict(config, prefix), prefix, False)


def _as_dict(config: Any, prefix: str) -> dict[str, Any]:
    """The keys and values of a config, also of the groups in it, which must be instances of their classes."""
    config_type: type = type(config)
    values: dict[str, Any] = {}
    for name, hint in type_hints(config_type).items():
        value, full_name = getattr(config, name), f"{prefix}.{name}" if prefix else name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, typing.cast(type, hint)):
                raise _refusal(full_name, value, _describe(hint), spec_of(config_type, name))
            value = _as_dict(value, full_name)
        values[name] = value
    return values


def _instance(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    hints: dict[str, Any] = type_hints(typing.cast(type, config_type))
    return config_type(
        **{
            name: _instance(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


# ---------------------------------------------------------------------------------------------------------- pydantic
# Types and ranges are checked by pydantic, in a TypedDict that has a config's keys. Config classes stay plain
# dataclasses, which can be read, compared and replaced without it; and a TypedDict's keys, unlike fields of a pydantic
# model, may have any name (copy, model_type). pydantic is imported when the first config is made, so that --help does
# not wait for it.

_RANGES = {"greater_than": "> {gt:g}", "greater_than_equal": ">= {ge:g}", "less_than": "< {lt:g}"}
_RANGES |= {"less_than_equal": "<= {le:g}", "finite_number": "finite", "choice": "{allowed}"}


@functools.cache
def type_hints(config_type: type) -> dict[str, Any]:
    """Name -> type of each field of a config class."""
    hints = typing.get_type_hints(config_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def _validated(config_type: type, values: dict[str, Any], prefix: str, numbers_as_text: bool) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        return _validator(config_type, numbers_as_text).validate_python(values)
    except ValidationError as error:
        raise _first_problem(error.errors(include_url=False), config_type, values, prefix) from None


@functools.cache
def _validator(config_type: type, numbers_as_text: bool) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(_schema(config_type, numbers_as_text))


def _schema(config_type: type, numbers_as_text: bool) -> Any:
    """The TypedDict with the keys of a config class."""
    from pydantic import ConfigDict
    from typing_extensions import TypedDict

    typed_dict: Any = TypedDict  # to type checkers, its fields have to be literals
    schema = typed_dict(
        config_type.__name__,
        {
            name: _annotated(hint, spec_of(config_type, name), numbers_as_text)
            for name, hint in type_hints(config_type).items()
        },
        total=False,
    )
    schema.__pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=numbers_as_text)
    return schema


def _annotated(hint: Any, spec: KeySpec, numbers_as_text: bool) -> Any:
    """A type hint of a config for pydantic: strict, and within the bounds and choices of its key."""
    from pydantic import AfterValidator, BeforeValidator, Field, Strict

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    generic: Any = origin  # to type checkers, types in brackets have to be literals
    annotated: Any = Annotated
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _schema(hint, numbers_as_text)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_annotated(one, spec, numbers_as_text) for one in arguments)]  # noqa: UP007
    if origin is list:
        return annotated[generic[_annotated(arguments[0], spec, False)], Strict()]
    if origin is tuple:
        items = tuple(one if one is Ellipsis else _annotated(one, spec, False) for one in arguments)
        return annotated[generic[items], Strict(), BeforeValidator(_list_as_tuple)]
    if origin is dict:
        key_type, item = _annotated(arguments[0], KeySpec(""), False), arguments[1]
        return annotated[generic[key_type, _annotated(item, KeySpec(""), numbers_as_text)], Strict()]
    limits: list[Any] = []
    if spec.choices is not None:
        limits.append(AfterValidator(functools.partial(_require_choice, spec.choices)))
    if hint in (int, float):
        low, high = ("gt", "lt") if spec.exclusive else ("ge", "le")
        bounds: dict[str, Any] = {low: spec.low, high: spec.high, "allow_inf_nan": False if hint is float else None}
        limits.append(Field(**{name: bound for name, bound in bounds.items() if bound is not None}))
    if hint in (bool, int, float) or (hint is str and not numbers_as_text):
        limits.append(Strict())
    return annotated[(hint, *limits)] if limits else hint


def _list_as_tuple(value: Any) -> Any:
    """YAML has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _require_choice(choices: tuple[Any, ...], value: Any) -> Any:
    from pydantic_core import PydanticCustomError

    if value not in choices:
        allowed = ", ".join("null" if choice is None else repr(choice) for choice in choices)
        raise PydanticCustomError("choice", "", {"allowed": f"one of {allowed}"})
    return value


def _first_problem(errors: Sequence[Any], config_type: type, values: Mapping[str, Any], prefix: str) -> UserError:
    """The error about the first unknown key, or else about the first invalid value."""
    unknown = [error for error in errors if error["type"] in ("extra_forbidden", "invalid_key")]
    first = (unknown or errors)[0]["loc"]
    *groups, name = first if unknown else _key_of(first, config_type)
    where, value = config_type, values
    for group in groups:
        where, value = type_hints(where)[group], value[group]
    full_name = ".".join(map(str, [prefix, *groups, name] if prefix else [*groups, name]))
    if unknown:
        known = list(type_hints(where))
        near = did_you_mean(str(name), known, otherwise=f"; there are {', '.join(known)}")
        return UserError(f"unknown key {full_name}{near}")
    # Of a union, each type that the value does not have is an error; a value out of its type's range says more.
    same_key = [error for error in errors if error["loc"][: len(groups) + 1] == (*groups, name)]
    ranges = [_RANGES[error["type"]].format(**error.get("ctx", {})) for error in same_key if error["type"] in _RANGES]
    allowed = ranges[0] if ranges else _describe(type_hints(where)[name])
    return _refusal(full_name, value[name], allowed, spec_of(where, name))


def _key_of(location: tuple[Any, ...], config_type: type) -> tuple[Any, ...]:
    """The names of the groups and of the key, at the start of pydantic's location of an error inside its value."""
    hint: Any = config_type
    for depth, name in enumerate(location):
        if not dataclasses.is_dataclass(hint):
            return location[:depth]
        hint = type_hints(typing.cast(type, hint))[name]
    return location


def _refusal(name: str, value: Any, allowed: str, spec: KeySpec) -> UserError:
    return UserError(f"{name}={value!r}: must be {allowed}{f' ({spec.comment})' if spec.comment else ''}")


def spec_of(config_type: type, name: str) -> KeySpec:
    """The :class:`KeySpec` of a field of a config class."""
    [field] = [field for field in dataclasses.fields(config_type) if field.name == name]
    return field.metadata.get("key", KeySpec(""))


def _describe(hint: Any) -> str:
    """A type hint in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {' and '.join(map(_describe, arguments))}"
    if origin in (list, tuple):
        return f"a list, each item {_describe(arguments[0])}"
    if origin is dict:
        return f"a dictionary, each name {_describe(arguments[0])}, each value {_describe(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint) or ("anything" if hint is Any else hint.__name__)
