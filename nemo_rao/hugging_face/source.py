"""The Hugging Face model that is imported: found or downloaded, and held against what its config.json asks for.

Before the conversion only the headers of weights are read. No code of the model's is run.
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
    """A model that can be imported, as far as its config.json says.

    Attributes:
        folder: absolute.
        given: config.json.
        family: of the model.
        config: transformers' config of its network.
    """

    folder: Path
    given: Mapping[str, Any]
    family: Family
    config: Any


def find_source(source: str, *, engine: str, allow_pickle: bool, ignored: Collection[str]) -> Source:
    """The model in the folder that ``source`` is, or into which the model of that name is downloaded.

    Args:
        engine: that converts it.
        allow_pickle: weights in ``*.bin`` are downloaded, too.
        ignored: see :func:`nemo_rao.hugging_face.config_keys.read_config`.

    Raises:
        UserError: there is neither such a folder nor such a model, or it is one that cannot be imported; of a model
            that would be downloaded, before its weights are.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _describe(folder.absolute(), engine, ignored)
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{KEY}: {source}: no such folder; give the folder or name (ORG/NAME) of a Hugging Face model")
    from huggingface_hub import snapshot_download

    say(f"downloading {source}")
    small = ["*.json", "*.model", "*.txt", "*.jinja"]
    weights = ["*.safetensors", "*.bin"] if allow_pickle else ["*.safetensors"]
    try:
        _describe(Path(snapshot_download(source, allow_patterns=small)), engine, ignored)
        return _describe(Path(snapshot_download(source, allow_patterns=[*small, *weights])), engine, ignored)
    except UserError:
        raise
    except Exception as error:  # network, access, a name that there is not: each its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{KEY}: {source} is not a folder, and cannot be downloaded ({type(error).__name__}: {reason}); give a "
            "folder, or a name that huggingface.co knows"
        ) from None


def _describe(folder: Path, engine: str, ignored: Collection[str]) -> Source:
    _check_kind(folder)
    given = read_json(folder / "config.json", KEY)
    family = family_of(given, folder, engine)
    return Source(folder, given, family, read_config(given, family, f"{KEY}: {folder / 'config.json'}", ignored))


def _check_kind(folder: Path) -> None:
    """Refuses folders without a config.json that are something else."""
    if (folder / "config.json").exists():
        return
    if (folder / "weights").is_dir() or (folder / "checkpoints").is_dir():
        raise UserError(
            f"{KEY}: {folder} is a NeMo checkpoint or a run already: model.restore_from_path takes it unchanged"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{KEY}: {folder} holds adapters alone (adapter_config.json); merge them into their model first, with "
            "peft's merge_and_unload"
        )


def family_of(given: Mapping[str, Any], folder: Path, engine: str, *, key: str = KEY) -> Family:
    """The family of the model in ``folder``, whose config.json is ``given``.

    Args:
        key: the argument that names the folder, for messages.

    Raises:
        UserError: it is of none that ``engine`` converts.
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
    here = " by NeMo's engine, but by Megatron-Bridge's (make install ENGINE=bridge)" if known else ""
    raise UserError(
        f"{key}: {folder} is a {', '.join(map(str, architectures))}, which {cannot}{here}; {names_of(engine)} can"
    )
