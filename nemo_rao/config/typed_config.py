"""From composed keys and values to a typed, checked :class:`RunConfig`.

Values are merged into the defaults, and each key is checked against its :class:`nemo_rao.keys.KeySpec`. (OmegaConf's
structured configs were considered: they support neither ``Literal`` nor ``tuple``, and their messages name internal
types.)
"""

import copy
import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rao.config.architecture import warn_of_class
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, nearest
from nemo_rao.keys import KeySpec, make, spec_of, type_hints
from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.other_names import counterpart


def typed_config(given: DictConfig, *, where: str) -> RunConfig:
    """The defaults with ``given`` merged into them, typed and checked.

    Args:
        given: keys and values as composed or loaded; interpolations may still be unresolved.
        where: the recipe's name, for messages without a key.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, or an unresolvable interpolation.
    """
    overrides = OmegaConf.to_container(given, resolve=False)
    if not isinstance(overrides, dict):
        raise UserError(f"recipe {where}: must consist of groups of keys, such as trainer: {{max_steps: 100}}")
    _require_known_keys(RunConfig, overrides, prefix="")
    values = _merged(copy.deepcopy(_defaults()), overrides)
    if _has_interpolations(overrides):
        try:
            values = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key or where}: {first_line(error)}") from None
    config = make(RunConfig, values)
    warn_of_class(config)
    return config


def load_recipe(path: Path) -> RunConfig:
    """Load the complete recipe that a run saved, ``recipe.yaml``.

    Raises:
        UserError: the file cannot be read, or is not a recipe of this version.
    """
    try:
        given = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: is not a recipe")
    try:
        return typed_config(given, where=str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@functools.cache
def known_keys(config_type: type = RunConfig, prefix: str = "") -> Mapping[str, KeySpec]:
    """Every key by its dotted name, groups of keys included, in the order in which they are defined."""
    found: dict[str, KeySpec] = {}
    for name, hint, spec in _keys_of(config_type):
        found[prefix + name] = spec
        if _is_section(hint):
            found |= known_keys(hint, f"{prefix}{name}.")
    return found


@functools.cache
def types_of_keys(config_type: type = RunConfig, prefix: str = "") -> Mapping[str, Any]:
    """The type of every key that is not a group, by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint, _ in _keys_of(config_type):
        found |= types_of_keys(hint, f"{prefix}{name}.") if _is_section(hint) else {prefix + name: hint}
    return found


def require_known(name: str) -> None:
    """Refuse an unknown key, unless it is in a free-form dictionary such as ``model.arch.extra``."""
    free = (key for key, hint in types_of_keys().items() if typing.get_origin(hint) is dict)
    if name not in known_keys() and not any(name.startswith(f"{key}.") for key in free):
        raise _unknown_key(name)


@functools.cache
def _defaults() -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(RunConfig())))
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _merged(values: dict, others: dict) -> Any:
    """Merge ``others`` into ``values``, in place, as ``OmegaConf.merge`` does.

    That function takes 20 ms for all keys, most of the time to compose a recipe that is in the cache.
    """
    for name, value in others.items():
        ours = values.get(name)
        values[name] = _merged(ours, value) if isinstance(ours, dict) and isinstance(value, dict) else value
    return values


def _has_interpolations(value: Any) -> bool:
    """Whether the value contains an interpolation to resolve, or a mandatory value that is missing."""
    if isinstance(value, dict):
        return any(map(_has_interpolations, value.values()))
    if isinstance(value, list):
        return any(map(_has_interpolations, value))
    return isinstance(value, str) and ("${" in value or value == "???")


def _require_known_keys(config_type: type, given: dict, prefix: str) -> None:
    """Refuse unknown keys, and remove empty groups (all of their lines are commented out)."""
    hints = {name: hint for name, hint, _ in _keys_of(config_type)}
    for name, value in list(given.items()):
        key = f"{prefix}{name}"
        if name not in hints:
            raise _unknown_key(key)
        if not _is_section(hints[name]):
            continue
        if value is None:
            del given[name]
        elif isinstance(value, dict):
            _require_known_keys(hints[name], value, f"{key}.")
        else:
            raise not_a_value(key, value)


def not_a_value(group: str, value: Any) -> UserError:
    first = next((key for key in known_keys() if key.startswith(f"{group}.")), None)
    remedy = f"set one, such as {first}" if first else "it has none"
    return UserError(f"{group}={value}: {group} is a group of keys; {remedy}")


def _unknown_key(name: str) -> UserError:
    if name.partition(".")[0] == "cluster":
        return UserError(
            f"unknown key {name}; it applies only to nemo-rao launch, which takes the same recipe and keys"
        )
    keys = list(known_keys())
    group, _, last = name.rpartition(".")
    # In an objective's group, a suggestion of another objective's key would not help.
    of_objective = group.removeprefix("model.") in OBJECTIVES
    here = counterpart(name)
    if here is not None and not (of_objective and any(key.split(".")[1] in OBJECTIVES for key in here.keys)):
        return UserError(f"unknown key {name}; {here}")
    if of_objective:
        own = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == group}
        near = nearest(last, own)
        remedy = f"did you mean {own[near]}?" if near else f"the keys of {group} are {', '.join(own)}"
        return UserError(f"unknown key {name}; {remedy}")
    # A misspelled key; the right key in the wrong group; a badly misspelled one; both.
    meant = (
        _nearest_key(name, keys, 0.8)
        or [key for key in keys if key.rpartition(".")[2] == last][:3]
        or _nearest_key(name, keys, 0.6)
        or [key for key in keys if nearest(last, [key.rpartition(".")[2]], cutoff=0.75)][:3]
    )
    remedy = f"did you mean {' or '.join(meant)}?" if meant else "all keys: nemo-rao train --print-config"
    return UserError(f"unknown key {name}; {remedy}")


def _nearest_key(name: str, keys: list[str], cutoff: float) -> list[str]:
    near = nearest(name, keys, cutoff=cutoff)
    return [] if near is None else [near]


@functools.cache
def _keys_of(config_type: type) -> tuple[tuple[str, Any, KeySpec], ...]:
    """``(name, type, spec)`` of each key of a config class."""
    return tuple((name, hint, spec_of(config_type, name)) for name, hint in type_hints(config_type).items())


def _is_section(hint: Any) -> TypeGuard[type]:
    return dataclasses.is_dataclass(hint)


def alternatives(hint: Any) -> set[Any]:
    """The types of a union; any other type is a union of one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set(typing.get_args(hint))
    return {hint}


def first_line(error: BaseException) -> str:
    """The first line of a Hydra or OmegaConf error: the others are about internal types and paths."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
