"""Files of a model's weights, and the headers of safetensors. No tensor is read.

transformers reads ``model.safetensors`` if it exists, vLLM what the index names: a directory in which the two disagree
holds two models, and is refused. The header of a safetensors file states where each tensor begins and ends, so a
truncated file is detected by its size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rao.errors import UserError
from nemo_rao.model_files.config_json import read_json

WHOLE, PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_FETCH = "Copy, export or download the model again."
# Names in the header of the library that wrote the tensors. MLX uses PyTorch's layout; others do not.
_SAME_LAYOUT = ("pt", "mlx")
_OTHER_LAYOUT = ("tf", "flax")


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file.

    Attributes:
        tensors: dtype (``F32``, ``BF16``, ...) and shape, by name.
        has_format: whether transformers 4 can read the file: it has no metadata, or metadata with the format.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    has_format: bool


def weight_files(folder: Path, key: str, *, allow_pickle: bool = False) -> list[Path]:
    """Return the files of the weights, sorted by name; all exist.

    Args:
        key: the option or argument that names the directory, for messages.
        allow_pickle: use ``pytorch_model*.bin`` if there are no safetensors.

    Raises:
        UserError: there are none, one is missing, the directory holds two models, or the weights are pickles.
    """
    if (files := _files(folder, WHOLE, key)) is not None:
        return files
    pickles = sorted(folder.glob("*.bin"))
    if allow_pickle and (files := _files(folder, PICKLE, key)) is not None:
        return files
    if not pickles:
        raise UserError(f"{key}: {folder} has no weights, neither {WHOLE} nor {WHOLE}{_INDEX}. {_FETCH}")
    name = pickles[0].name
    remedy = f" (only {PICKLE} and {PICKLE}{_INDEX} are read)" if allow_pickle else ", and pickles can run code"
    raise UserError(
        f"{key}: {folder} has no weights in safetensors: {name} is pickled{remedy}. Save the model as safetensors"
        + ("." if allow_pickle or key != "SOURCE" else ", or add --allow-pickle if you trust its author.")
    )


def _files(folder: Path, whole: str, key: str) -> list[Path] | None:
    """Return the files of one format: ``whole``, or those that its index names; ``None`` if there is neither."""
    named = _indexed(folder, whole, key)
    if (folder / whole).is_file():
        if named and set(named.values()) != {whole}:
            raise UserError(
                f"{key}: {folder} has both {whole} and {whole}{_INDEX}, which names {sorted(set(named.values()))[0]} "
                "and others: two models, one of them outdated. Remove the index and its files, or "
                f"{whole}, whichever is outdated."
            )
        return [folder / whole]
    if named is None:
        return None
    files = [folder / name for name in sorted(set(named.values()))]
    for file in files:
        if file.name != str(file.relative_to(folder)) or not file.is_file():
            raise UserError(f"{key}: {file} is missing, which {whole}{_INDEX} names. {_FETCH}")
    return files


def _indexed(folder: Path, whole: str, key: str) -> dict[str, str] | None:
    """Read the index's map from tensor to file name; ``None`` if there is no index."""
    index = folder / (whole + _INDEX)
    if not index.is_file():
        return None
    named = read_json(index, key).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{key}: {index} names no files (weight_map). {_FETCH}")
    return {str(tensor): str(file) for tensor, file in named.items()}


def read_headers(folder: Path, files: list[Path], key: str) -> dict[Path, Header]:
    """Read the headers of the safetensors among ``files``, from :func:`weight_files`, and check them for consistency.

    Raises:
        UserError: a file is damaged, was written by TensorFlow or Flax, or the index belongs to other files.
    """
    headers = {file: read_header(file, key) for file in files if file.suffix == ".safetensors"}
    where: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in where:
                raise UserError(f"{key}: {where[name]} and {file.name} both have a tensor {name}. {_FETCH}")
            where[name] = file
    named = _indexed(folder, WHOLE, key) if headers else None
    for name in sorted(named.keys() ^ where.keys()) if named is not None else ():
        with_it, without = ("index", "files") if named is not None and name in named else ("files", "index")
        raise UserError(
            f"{key}: {folder}: {WHOLE}{_INDEX} does not match the files: tensor {name} is in the {with_it} but not "
            f"in the {without}. {_FETCH}"
        )
    return headers


def read_header(file: Path, key: str) -> Header:
    """Read the header of a complete safetensors file.

    Raises:
        UserError: it is truncated, damaged, or holds the tensors of TensorFlow or Flax.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size - 8:
                raise UserError(f"{key}: {file} is truncated: it has {size} bytes, its header {length}. {_FETCH}")
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: {file} is not a safetensors file ({type(error).__name__}). {_FETCH}") from None
    if size < end:
        raise UserError(f"{key}: {file} is truncated: it has {size} of {end} bytes. {_FETCH}")
    if size > end:
        raise UserError(f"{key}: {file} is damaged: it has {size} bytes, but its tensors end at {end}. {_FETCH}")
    _check_offsets(file, key)
    given = metadata.get("format") if isinstance(metadata, Mapping) else None
    if given in _OTHER_LAYOUT:
        raise UserError(f"{key}: {file} holds the weights of a {given} model. Save the model with PyTorch.")
    return Header(tensors, has_format=metadata is None or given in _SAME_LAYOUT)


def _check_offsets(file: Path, key: str) -> None:
    """Let the library check the rest of a header (sizes, gaps, overlaps)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{key}: {file} is damaged ({' '.join(str(error).split())[:200]}). {_FETCH}") from None
