"""config.json, in the form of any release of transformers.

transformers 5 writes ``rope_parameters`` where earlier releases write ``rope_theta`` and ``rope_scaling``. Earlier
releases silently ignore the new key and use the default base: a model of base 500000 then runs with 10000.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError

ROPE_PARAMETERS = "rope_parameters"
_GLOBAL, _LOCAL, _LOCAL_BASE = "full_attention", "sliding_attention", "rope_local_base_freq"
_MOVED = ("rope_theta", "partial_rotary_factor")  # top-level keys in transformers 4


def read_json(file: Path, key: str) -> dict[str, Any]:
    """Return the object in ``file``.

    Args:
        key: the option or argument that names the file's directory, for messages.

    Raises:
        UserError: it is missing, cannot be read, or is not an object.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{key}: {file.parent} has no {file.name}. Pass the directory of a model in Hugging Face's format."
        ) from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {file} cannot be read ({reason}). Copy or download it again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} is not a JSON object. Copy or download it again.")
    return found


def with_flat_rope(given: Mapping[str, Any], location: str) -> dict[str, Any]:
    """Convert config.json to ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` from ``rope_parameters``.

    Separate settings for layers with a window, as in Gemma 3, become ``rope_local_base_freq``. ``rope_scaling`` then
    has a ``rope_type``, or is ``None`` without scaling. A ``rope_theta`` within ``rope_scaling``, which transformers 5
    reads and transformers 4 does not, is moved out of it.

    Args:
        location: the file, for messages.

    Raises:
        UserError: layers differ in other ways, or the settings contradict each other.
    """
    found = dict(given)
    new, old = found.pop(ROPE_PARAMETERS, None), found.pop("rope_scaling", None)
    if isinstance(new, dict) and _by_layer(new) and _unscaled(new[_LOCAL]):
        base = new[_LOCAL]["rope_theta"]
        if found.setdefault(_LOCAL_BASE, base) != base:
            raise UserError(
                f"{location}: {_LOCAL_BASE} is {found[_LOCAL_BASE]}, but {base} in {ROPE_PARAMETERS}. Remove the "
                "wrong one."
            )
        new = new[_GLOBAL]
    settings = {
        name: _flat(value, f"{location}: {name}") for name, value in ((ROPE_PARAMETERS, new), ("rope_scaling", old))
    }
    for name, values in settings.items():
        for moved in _MOVED:
            if (value := values.pop(moved, None)) is None:
                continue
            if found.get(moved, value) not in (value, None):
                raise UserError(f"{location}: {moved} is {found[moved]}, but {value} in {name}. Remove the wrong one.")
            found[moved] = value
    scaling = settings["rope_scaling"] or settings[ROPE_PARAMETERS]
    if settings[ROPE_PARAMETERS] and settings["rope_scaling"] not in ({}, settings[ROPE_PARAMETERS]):
        raise UserError(f"{location}: rope_scaling and {ROPE_PARAMETERS} differ. Remove the wrong one.")
    if scaling.get("rope_type") == "default" and len(scaling) == 1:
        scaling = {}
    if {*settings} & {*given}:
        found["rope_scaling"] = scaling or None
    return found


def _by_layer(value: Mapping[str, Any]) -> bool:
    """Whether there are separate settings for global and local layers, and nothing else."""
    kinds = {name for name, inner in value.items() if isinstance(inner, dict)}
    return kinds == {_GLOBAL, _LOCAL} and {value[name] for name in value.keys() - kinds} <= {None, "default"}


def _unscaled(value: Any) -> bool:
    return isinstance(value, dict) and "rope_theta" in value and not set(value) - {"rope_theta", "rope_type"}


def _flat(value: Any, location: str) -> dict[str, Any]:
    """Return the settings of one rotary embedding, with ``rope_type`` for the older ``type``, without nulls."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f'{location}: must be an object such as {{"rope_type": "default"}}, but is {json.dumps(value)[:100]}.'
        )
    if any(isinstance(inner, dict) for inner in value.values()):
        raise UserError(
            f"{location} differs by kind of layer ({', '.join(map(str, value))}), which is not supported. Use a model "
            "with one rotary embedding for all layers."
        )
    found = {name: inner for name, inner in value.items() if inner is not None}
    kind = found.pop("type", None)
    if kind is not None and found.setdefault("rope_type", kind) != kind:
        raise UserError(f"{location}: rope_type is {found['rope_type']}, but type is {kind}. Remove the wrong one.")
    if found and set(found) - set(_MOVED):
        found.setdefault("rope_type", "default")
    return found
