"""A policy's folder, looked at before anything is loaded: what is missing, what is cut short, which model it is.

Only safetensors are loaded: a pickled file could run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
    configuration = _json(folder / "config.json")
    if not isinstance(configuration, dict) or "model_type" not in configuration:
        raise UserError(f"model {given}: its config.json names no model_type; export or download the model again")
    for file in weight_files(folder):
        _check_safetensors(file)
    return folder


def check_architecture(folder: Path) -> None:
    """Refuse, by its configuration alone, what `transformers` does not run as a causal language model.

    Raises:
        UserError: a kind of model that it does not know, or knows for other tasks only.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = _json(folder / "config.json")["model_type"]
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


def weight_files(folder: Path) -> list[Path]:
    """The files with the model's weights, in order of their names; all are there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f" ({others[0]} is pickled, and is never loaded: save it as safetensors)" if others else ""
        raise UserError(
            f"model {folder}: has no weights, neither {WEIGHTS} nor {INDEX}{found}; export or download the model again"
        )
    index = _json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX}: lists no weights; export or download the model again")
    files = [folder / name for name in sorted(set(map(str, names.values())))]
    for file in files:
        if not file.is_file():
            raise UserError(f"model {folder}: {file.name} is missing; copy or download it again")
    return files


def fingerprint(folder: Path) -> str:
    """Tells one model from another, wherever it lies: its settings, its tokenizer, and blocks from all its weights.

    Of each file of weights its size, its header and 64 blocks of 64 KiB are read: whole files would take as long as
    loading the model, and training changes every part of a matrix.
    """
    found = hashlib.sha256()
    weights = weight_files(folder)
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
    configuration = _json(folder / "config.json")
    configuration = configuration.get("text_config") or configuration
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(configuration.get(name), int) and configuration[name] > 0:
            return int(configuration[name])
    return None


def stop_tokens(folder: Path) -> set[int]:
    """The tokens with which the model itself says that it ends, besides its tokenizer's."""
    path = folder / "generation_config.json"
    ends = _json(path).get("eos_token_id") if path.is_file() else None
    return {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}


def _check_safetensors(file: Path) -> None:
    """The format's header says where the last tensor ends, so a file that was cut short is known by its size."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < size else None
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise UserError(f"{file}: is no whole safetensors file; copy or download it again") from None
    if size < 8 + length + end:
        raise UserError(f"{file}: has {size} of {8 + length + end} bytes; copy or download it again")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy or download it again") from None
