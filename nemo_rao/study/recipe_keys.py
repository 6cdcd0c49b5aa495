"""Keys of recipes in studies: written as overrides, and read as numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, did_you_mean

_PLAIN = re.compile(r"[A-Za-z0-9_./:+-]+")  # text that Hydra reads without quotes


def override_text(key: str, value: Any) -> str:
    """Format a YAML value as ``key=value`` of the command line."""
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return f"{key}={value}"
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'
    if isinstance(value, Mapping):
        return f"{key}={{{','.join(override_text(name, one).replace('=', ':', 1) for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"{key}=[{','.join(override_text('', one)[1:] for one in value)}]"
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"


def key_value(config: RunConfig, over: str, where: str) -> float | str:
    """Return the value of a key or of its inverse ``1/KEY``; text if it is not a number, such as ``auto``.

    Args:
        over: ``KEY`` or ``1/KEY``.
        where: the study's key that names it, for errors.

    Raises:
        UserError: the key does not exist or is a group, or the inverse of 0 is requested.
    """
    inverse = over.startswith("1/")
    found: Any = config
    for part in over.removeprefix("1/").split("."):
        known = vars(found) if dataclasses.is_dataclass(found) else {}
        if part not in known:
            raise UserError(f"{where}: {over}: no such key{did_you_mean(part, known)}")
        found = known[part]
    if dataclasses.is_dataclass(found):
        raise UserError(f"{where}: {over} is a group of keys. Name one of them.")
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return str(found)
    if inverse and found == 0:
        raise UserError(f"{where}: {over}: the key is 0, which has no inverse.")
    return 1 / found if inverse else float(found)
