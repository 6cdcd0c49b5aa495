"""A policy's folder, looked at before anything is loaded: what is missing, what is cut short, which model it is.

Only safetensors are loaded: a pickled file could run code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.model_files.config_json import ROPE_PARAMETERS, read_json, with_flat_rope
from nemo_rao.model_files.weights import read_headers, weight_files

_KEY = "model"  # how messages name the folder's option or argument
# Kinds of rotary scaling whose settings transformers 4 and 5 spell alike.
_SAME_IN_BOTH = (None, "linear", "dynamic", "yarn", "llama3")
_BLOCK, _BLOCKS = 1 << 16, 64


def check_folder(given: str | os.PathLike[str]) -> Path:
    """The folder, absolute, once it is known to hold a whole model.

    Raises:
        UserError: there is no such folder, or no configuration, or no weights in it, or not all of them.
    """
    folder = Path(os.path.expanduser(given)).absolute()
    if not folder.is_dir():
        raise UserError(
            f"model {given}: no such folder; give a folder in Hugging Face's format, "
            "such as `nemo-rao export-hf` writes"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {given}: has no config.json; give a folder in Hugging Face's format (a checkpoint of a run is "
            "turned into one by `nemo-rao export-hf`)"
        )
    if "model_type" not in read_json(folder / "config.json", _KEY):
        raise UserError(f"model {given}: its config.json names no model_type; export or download the model again")
    read_headers(folder, weight_files(folder, _KEY), _KEY)
    return folder


def read_configuration(folder: Path) -> Any:
    """`transformers`' configuration of the model, in the installed release's spelling.

    Raises:
        UserError: a kind of model that it does not know, or knows for other tasks only, or settings that it would
            ignore.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = read_json(folder / "config.json", _KEY)["model_type"]
    moved = moved_settings(folder)
    try:
        configuration = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds: a type that is not known, code of its own, values out of range
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {folder}: `transformers` cannot read the configuration of this {kind} ({reason}); give a model of "
            "a kind that it has, or install a release that has this one"
        ) from None
    if type(configuration) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model {folder}: {kind} is no causal language model that `transformers` has; give one that generates text"
        )
    for name, value in moved.items():
        if name not in vars(configuration) and name != "rope_scaling":
            raise UserError(
                f"model {folder}: config.json has {name} in {ROPE_PARAMETERS}, which the installed `transformers` does "
                f"not read from a {kind}; save the model with `transformers` 4"
            )
        setattr(configuration, name, value)
    return configuration


def moved_settings(folder: Path) -> dict[str, Any]:
    """Settings that `transformers` 5 writes into ``rope_parameters``, by the keys that the installed release reads.

    Raises:
        UserError: they have no such keys.
    """
    import transformers

    given, file = read_json(folder / "config.json", _KEY), folder / "config.json"
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    for name, inner in _objects(given):
        if ROPE_PARAMETERS in inner:
            raise UserError(
                f"{file}: {name}.{ROPE_PARAMETERS} is ignored by the installed `transformers` "
                f"{transformers.__version__}; save the model with `transformers` 4"
            )
    scaling = given.get("rope_scaling")
    if ROPE_PARAMETERS not in given and not (isinstance(scaling, Mapping) and "rope_theta" in scaling):
        return {}
    flat = with_flat_rope(given, str(file))
    kind = (flat["rope_scaling"] or {}).get("rope_type")
    if kind not in _SAME_IN_BOTH:
        raise UserError(
            f"{file}: rope_type {kind} in {ROPE_PARAMETERS} is spelled otherwise for the installed `transformers` "
            f"{transformers.__version__}; save the model with `transformers` 4"
        )
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    return {name: flat[name] for name in names if name in flat and flat[name] != given.get(name)}


def _objects(given: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects within config.json, such as ``text_config``, with their dotted names."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield before + name, value
            yield from _objects(value, f"{before}{name}.")


def tensors_for_transformers(folder: Path) -> dict[str, Any] | None:
    """The weights, where `transformers` would refuse their files: metadata that does not name a format; else ``None``.

    Without that entry the tensors are the same.
    """
    files = weight_files(folder, _KEY)
    if all(header.has_format for header in read_headers(folder, files, _KEY).values()):
        return None
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def fingerprint(folder: Path) -> str:
    """Tells one model from another, wherever it lies: its settings, its tokenizer, and blocks from all its weights.

    Of each file of weights its size, its header and 64 blocks of 64 KiB are read: whole files would take as long as
    loading the model, and training changes every part of a matrix.
    """
    found = hashlib.sha256()
    weights = weight_files(folder, _KEY)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt") and path.is_file():
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in weights:
        size = path.stat().st_size
        found.update(f"{path.name}\0{size}".encode())
        with path.open("rb") as file:
            for number in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()[:32]


def context_length(folder: Path) -> int | None:
    """Tokens of prompt and response together that the model takes; ``None`` where its configuration has no limit."""
    configuration = read_json(folder / "config.json", _KEY)
    configuration = configuration.get("text_config") or configuration
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(configuration.get(name), int) and configuration[name] > 0:
            return int(configuration[name])
    return None


def stop_tokens(folder: Path) -> set[int]:
    """The tokens with which the model itself says that it ends, besides its tokenizer's."""
    path = folder / "generation_config.json"
    ends = read_json(path, _KEY).get("eos_token_id") if path.is_file() else None
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
