"""Repair of generation_config.json so that transformers can save it.

Some published models have sampling settings without ``do_sample`` (Llama 2, Vicuna 1.5). transformers loads them with
a warning but refuses to save them, which would otherwise only be found when a finished run is exported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.model_files.config_json import read_json

GENERATION = "generation_config.json"
# Settings of sampling, and the value with which each has no effect.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def read_generation_config(folder: Path, key: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the settings in ``folder``, or ``None``, and a line about each change made to them.

    Args:
        key: option or argument of the directory, for messages.

    Raises:
        UserError: they cannot be read, or transformers would refuse to save them.
    """
    file = folder / GENERATION
    if not file.is_file():
        return None, []
    given = read_json(file, key)
    given.pop("_from_model_config", None)
    fields, changed = _sound(given)
    _check(fields, f"{key}: {file}")
    return fields, changed


def _sound(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings with sampling parameters only if sampling is on, and a line about each change."""
    fields, changed = dict(given), []
    if fields.get("temperature") == 0:  # greedy in other libraries
        del fields["temperature"]
        fields["do_sample"] = False
        changed.append(f"{GENERATION}: temperature 0 becomes do_sample=false")
    unused = [name for name, neutral in _SAMPLING.items() if fields.get(name) not in (None, neutral)]
    if not unused or fields.get("do_sample"):
        pass
    elif fields.get("do_sample") is None:
        fields["do_sample"] = True
        changed.append(f"{GENERATION}: do_sample=true is set, as {', '.join(unused)} have no effect without it")
    else:
        fields = {name: value for name, value in fields.items() if name not in unused}
        changed.append(f"{GENERATION}: {', '.join(unused)} left out, as do_sample is false")
    return fields, changed


def _check(fields: Mapping[str, Any], location: str) -> None:
    """Reject settings that transformers refuses to save. They are saved for this, since the checks vary by release."""
    from transformers import GenerationConfig

    try:
        with tempfile.TemporaryDirectory() as folder:
            GenerationConfig.from_dict(dict(fields)).save_pretrained(folder)
    except Exception as error:  # ValueError, or anything caused by a value of a wrong type
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{location} is rejected by transformers ({reason}). Correct the file, or remove it, as it is optional."
        ) from None
