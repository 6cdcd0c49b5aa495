"""Checks of a policy's directory before anything is loaded: missing and truncated files, and the kind of model.

Only safetensors are loaded, since a pickled file could run code.
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

_KEY = "model"  # name of the directory's option or argument in messages
# Kinds of rotary scaling whose settings are the same in transformers 4 and 5.
_SAME_IN_BOTH = (None, "linear", "dynamic", "yarn", "llama3")
_BLOCK, _BLOCKS = 1 << 16, 64


def check_folder(given: str | os.PathLike[str]) -> Path:
    """Check that the directory holds a complete model, and return its absolute path.

    Raises:
        UserError: there is no such directory, it has no configuration or no weights, or some of them are missing.
    """
    folder = Path(os.path.expanduser(given)).absolute()
    if not folder.is_dir():
        raise UserError(
            f"model {given}: no such directory. Pass a directory in Hugging Face's format, "
            "such as the output of `nemo-rao export-hf`."
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model {given}: has no config.json. Pass a directory in Hugging Face's format (`nemo-rao export-hf` "
            "converts a checkpoint of a run)."
        )
    if "model_type" not in read_json(folder / "config.json", _KEY):
        raise UserError(f"model {given}: its config.json has no model_type. Export or download the model again.")
    read_headers(folder, weight_files(folder, _KEY), _KEY)
    return folder


def read_configuration(folder: Path) -> Any:
    """Read the model's `transformers` configuration, with the keys of the installed release.

    Raises:
        UserError: the kind of model is unknown to the installed release or not a causal language model, or some
            settings would be ignored.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = read_json(folder / "config.json", _KEY)["model_type"]
    moved = moved_settings(folder)
    try:
        configuration = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds: an unknown type, remote code, values out of range
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {folder}: `transformers` cannot read the configuration of this {kind} ({reason}). Use a model of "
            "a kind that it supports, or install a release that supports this one."
        ) from None
    if type(configuration) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model {folder}: {kind} is not a causal language model of `transformers`. Use a model that generates text."
        )
    for name, value in moved.items():
        if name not in vars(configuration) and name != "rope_scaling":
            raise UserError(
                f"model {folder}: config.json has {name} in {ROPE_PARAMETERS}, which the installed `transformers` does "
                f"not read for {kind}. Save the model with `transformers` 4."
            )
        setattr(configuration, name, value)
    return configuration


def moved_settings(folder: Path) -> dict[str, Any]:
    """Settings that `transformers` 5 writes into ``rope_parameters``, under the keys that the installed release reads.

    Raises:
        UserError: the installed release has no such keys.
    """
    import transformers

    given, file = read_json(folder / "config.json", _KEY), folder / "config.json"
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    for name, inner in _objects(given):
        if ROPE_PARAMETERS in inner:
            raise UserError(
                f"{file}: {name}.{ROPE_PARAMETERS} is ignored by the installed `transformers` "
                f"{transformers.__version__}. Save the model with `transformers` 4."
            )
    scaling = given.get("rope_scaling")
    if ROPE_PARAMETERS not in given and not (isinstance(scaling, Mapping) and "rope_theta" in scaling):
        return {}
    flat = with_flat_rope(given, str(file))
    kind = (flat["rope_scaling"] or {}).get("rope_type")
    if kind not in _SAME_IN_BOTH:
        raise UserError(
            f"{file}: rope_type {kind} in {ROPE_PARAMETERS} has a different form in the installed `transformers` "
            f"{transformers.__version__}. Save the model with `transformers` 4."
        )
    names = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    return {name: flat[name] for name in names if name in flat and flat[name] != given.get(name)}


def _objects(given: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects within config.json, such as ``text_config``, with their dotted names."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield before + name, value
            yield from _objects(value, f"{before}{name}.")


def tensors_for_transformers(folder: Path) -> dict[str, Any] | None:
    """Load the weights if `transformers` would reject their files for metadata without a format; else ``None``.

    The missing entry does not affect the tensors.
    """
    files = weight_files(folder, _KEY)
    if all(header.has_format for header in read_headers(folder, files, _KEY).values()):
        return None
    from safetensors.torch import load_file

    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def fingerprint(folder: Path) -> str:
    """Digest that identifies a model independently of its path: settings, tokenizer, and samples of the weights.

    For each weight file, its size, header and 64 blocks of 64 KiB are read: whole files would take as long as loading
    the model, and training changes every part of a matrix.
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
    """Maximum number of tokens of prompt and response together; ``None`` if the configuration has no limit."""
    configuration = read_json(folder / "config.json", _KEY)
    configuration = configuration.get("text_config") or configuration
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(configuration.get(name), int) and configuration[name] > 0:
            return int(configuration[name])
    return None


def stop_tokens(folder: Path) -> set[int]:
    """End tokens in the model's generation_config.json, in addition to the tokenizer's."""
    path = folder / "generation_config.json"
    ends = read_json(path, _KEY).get("eos_token_id") if path.is_file() else None
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
