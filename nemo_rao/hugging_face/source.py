"""The Hugging Face model to import: found or downloaded, and checked against its config.json.

Before the conversion, only the headers of the weights are read. The model's code is never run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import read_config
from nemo_rao.hugging_face.families import FAMILIES, Family, families_of, names_of
from nemo_rao.model_files.config_json import read_json
from nemo_rao.runtime.console import say

KEY = "SOURCE"  # the argument that names the model


@dataclass(frozen=True)
class Source:
    """A model that can be imported, judging by its config.json.

    Attributes:
        folder: absolute path.
        given: content of config.json.
        family: the model's family.
        config: transformers' config of its network.
    """

    folder: Path
    given: Mapping[str, Any]
    family: Family
    config: Any


def find_source(source: str, *, engine: str, allow_pickle: bool, ignored: Collection[str]) -> Source:
    """Find the model in the directory ``source``, or download the model of that name.

    Args:
        engine: engine that converts it.
        allow_pickle: also download weights in ``*.bin``.
        ignored: see :func:`nemo_rao.hugging_face.config_keys.read_config`.

    Raises:
        UserError: there is neither such a directory nor such a model, or it cannot be imported. A model is checked
            before its weights are downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _describe(folder.absolute(), engine, ignored)
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"{KEY}: {source}: no such directory. Pass the directory or name (ORG/NAME) of a Hugging Face model."
        )
    from huggingface_hub import snapshot_download

    say(f"downloading {source}")
    small = ["*.json", "*.model", "*.txt", "*.jinja"]
    weights = ["*.safetensors", "*.bin"] if allow_pickle else ["*.safetensors"]
    try:
        _describe(Path(snapshot_download(source, allow_patterns=small)), engine, ignored)
        return _describe(Path(snapshot_download(source, allow_patterns=[*small, *weights])), engine, ignored)
    except UserError:
        raise
    except Exception as error:  # network, access, an unknown name, each with its own exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{KEY}: {source} is not a directory, and cannot be downloaded ({type(error).__name__}: {reason}). Pass a "
            "directory, or the name of a model on huggingface.co."
        ) from None


def _describe(folder: Path, engine: str, ignored: Collection[str]) -> Source:
    _check_kind(folder)
    given = read_json(folder / "config.json", KEY)
    family = family_of(given, folder, engine)
    return Source(folder, given, family, read_config(given, family, f"{KEY}: {folder / 'config.json'}", ignored))


def _check_kind(folder: Path) -> None:
    """Reject directories without config.json that are recognisably something else."""
    if (folder / "config.json").exists():
        return
    if (folder / "weights").is_dir() or (folder / "checkpoints").is_dir():
        raise UserError(f"{KEY}: {folder} is already a NeMo checkpoint or a run. Set model.restore_from_path to it.")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{KEY}: {folder} contains only adapters (adapter_config.json). Merge them into their model first, with "
            "peft's merge_and_unload."
        )


def family_of(given: Mapping[str, Any], folder: Path, engine: str, *, key: str = KEY) -> Family:
    """Return the family of the model in ``folder``, whose config.json is ``given``.

    Args:
        key: argument of the directory, for messages.

    Raises:
        UserError: ``engine`` does not convert its family.
    """
    listed = given.get("architectures")
    architectures = listed if isinstance(listed, list) and listed else [f"model_type {given.get('model_type')}"]
    known = [
        family
        for family in FAMILIES
        if family.architecture in architectures and given.get("model_type") == family.model_type
    ]
    for family in known:
        if family in families_of(engine):
            return family
    cannot = "cannot be imported" if key == KEY else "cannot be exported"
    here = " by NeMo's engine, only by Megatron-Bridge's (make install ENGINE=bridge)" if known else ""
    raise UserError(
        f"{key}: {folder} is a {', '.join(map(str, architectures))}, which {cannot}{here}. Only {names_of(engine)} can."
    )
