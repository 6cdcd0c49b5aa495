"""The files with a model's weights, and the headers of those in safetensors. No tensor is read.

transformers reads ``model.safetensors`` where it exists, vLLM what the index names: a folder whose two disagree holds
two models, and is refused. A safetensors file says in its header where each tensor begins and ends, so one that was cut
short is recognised by its size.
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
_FETCH = "copy, export or download the model again"
# What the header calls the library that wrote the tensors. MLX keeps PyTorch's layout; other libraries do not.
_SAME_LAYOUT = ("pt", "mlx")
_OTHER_LAYOUT = ("tf", "flax")


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file.

    Attributes:
        tensors: dtype (``F32``, ``BF16``, ...) and shape, by name.
        has_format: transformers 4 reads the file: it has no metadata at all, or metadata that names the format.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    has_format: bool


def weight_files(folder: Path, key: str, *, allow_pickle: bool = False) -> list[Path]:
    """The files that hold the weights, sorted by name; all exist.

    Args:
        key: the option or argument that names the folder, for messages.
        allow_pickle: ``pytorch_model*.bin`` are taken where there are no safetensors.

    Raises:
        UserError: there are none, one is missing, the folder holds two models, or the weights are pickles.
    """
    if (files := _files(folder, WHOLE, key)) is not None:
        return files
    pickles = sorted(folder.glob("*.bin"))
    if allow_pickle and (files := _files(folder, PICKLE, key)) is not None:
        return files
    if not pickles:
        raise UserError(f"{key}: {folder} has no weights, neither {WHOLE} nor {WHOLE}{_INDEX}; {_FETCH}")
    name = pickles[0].name
    remedy = f"; read are {PICKLE} and {PICKLE}{_INDEX}" if allow_pickle else ", and pickles can run code"
    raise UserError(
        f"{key}: {folder} has no weights in safetensors: {name} is pickled{remedy}; save the model as safetensors"
        + ("" if allow_pickle or key != "SOURCE" else ", or give --allow-pickle if you trust whoever made it")
    )


def _files(folder: Path, whole: str, key: str) -> list[Path] | None:
    """The files of one format: ``whole``, or those that its index names; ``None`` where there is neither."""
    named = _indexed(folder, whole, key)
    if (folder / whole).is_file():
        if named and set(named.values()) != {whole}:
            raise UserError(
                f"{key}: {folder} has both {whole} and {whole}{_INDEX}, which names {sorted(set(named.values()))[0]} "
                "and others: two models, of which one is left from before; remove the index and its files, or "
                f"{whole}, whichever is the old one"
            )
        return [folder / whole]
    if named is None:
        return None
    files = [folder / name for name in sorted(set(named.values()))]
    for file in files:
        if file.name != str(file.relative_to(folder)) or not file.is_file():
            raise UserError(f"{key}: {file} is missing, which {whole}{_INDEX} names; {_FETCH}")
    return files


def _indexed(folder: Path, whole: str, key: str) -> dict[str, str] | None:
    """Tensor to file name, of the index; ``None`` where there is none."""
    index = folder / (whole + _INDEX)
    if not index.is_file():
        return None
    named = read_json(index, key).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError(f"{key}: {index} names no files (weight_map); {_FETCH}")
    return {str(tensor): str(file) for tensor, file in named.items()}


def read_headers(folder: Path, files: list[Path], key: str) -> dict[Path, Header]:
    """The headers of the safetensors among ``files``, from :func:`weight_files`, checked against each other.

    Raises:
        UserError: a file is damaged, was written by TensorFlow or Flax, or the index belongs to other files.
    """
    headers = {file: read_header(file, key) for file in files if file.suffix == ".safetensors"}
    where: dict[str, Path] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in where:
                raise UserError(f"{key}: {where[name]} and {file.name} both have a tensor {name}; {_FETCH}")
            where[name] = file
    named = _indexed(folder, WHOLE, key) if headers else None
    for name in sorted(named.keys() ^ where.keys()) if named is not None else ():
        with_it, without = ("index", "files") if named is not None and name in named else ("files", "index")
        raise UserError(
            f"{key}: {folder}: {WHOLE}{_INDEX} does not belong to the files: tensor {name} is in the {with_it} and not "
            f"in the {without}; {_FETCH}"
        )
    return headers


def read_header(file: Path, key: str) -> Header:
    """The header of a safetensors file that is whole.

    Raises:
        UserError: it is cut short, damaged, or holds the tensors of TensorFlow or Flax.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size - 8:
                raise UserError(f"{key}: {file} is cut short: it has {size} bytes, its header {length}; {_FETCH}")
            header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{key}: {file} is not a safetensors file ({type(error).__name__}); {_FETCH}") from None
    if size != end:
        raise UserError(f"{key}: {file} is not whole: it has {size} of {end} bytes; {_FETCH}")
    _check_offsets(file, key)
    given = metadata.get("format") if isinstance(metadata, Mapping) else None
    if given in _OTHER_LAYOUT:
        raise UserError(f"{key}: {file} holds the weights of a model in {given}; save the model with PyTorch")
    return Header(tensors, has_format=metadata is None or given in _SAME_LAYOUT)


def _check_offsets(file: Path, key: str) -> None:
    """What is left to check of a header (sizes, gaps, overlaps) is the library's own knowledge."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{key}: {file} is damaged ({' '.join(str(error).split())[:200]}); {_FETCH}") from None
