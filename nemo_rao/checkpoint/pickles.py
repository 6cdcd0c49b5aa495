"""Safe reading of checkpoints: NeMo's format contains pickles, and a pickle can run code when it is read.

    weights/.metadata    which tensor is stored where; torch unpickles it without checks
    weights/*.distcp     tensors, and small objects, also unpickled; one of Transformer Engine, ``_extra_state``, is a
                         tensor of bytes, which are again a pickle
    weights/common.pt    step numbers and the like

Before any of them is loaded, it is read here by an unpickler that knows only what such checkpoints consist of: torch's
records of shapes and offsets, numbers, tensors. Whatever references anything else is refused, regardless of its origin:
the origin of a directory cannot be determined, and a mark of ours could be forged. ``context/`` is not read at all.
"""

from __future__ import annotations

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.layout import weights_of
from nemo_rao.errors import UserError

# Modules whose classes are all allowed: plain records and enumerations.
_RECORDS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # written by torch itself
    ("collections", "OrderedDict"),
    ("collections", "ChainMap"),
}
# Megatron's records are torch's with further fields: reading them as torch's avoids importing Megatron.
_STAND_INS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): (_RECORDS[0], "Metadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): (_RECORDS[1], "SavePlan"),
}
# Functions that rebuild a tensor within a pickle: torch's, and megatron-core's replacement since 0.19.
_STORED = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
_OF_TENSORS = {("torch._utils", "_rebuild_tensor_v2"), ("torch", "device"), ("collections", "OrderedDict")}


def refuse_code(checkpoint: Path, key: str) -> None:
    """Refuse a checkpoint that could run code. Reads metadata and small objects, but no tensors.

    Args:
        checkpoint: directory with ``weights/``; missing files are ignored.
        key: key or option by which the user named it, for messages.

    Raises:
        UserError: one of its pickles references what no checkpoint needs, or cannot be read.
    """
    weights = weights_of(checkpoint)
    file = weights / ".metadata"
    try:
        if file.is_file():
            metadata = read_metadata(checkpoint)
            for index, location in _objects(metadata):
                file = weights / location.relative_path
                if file.is_file():
                    _read_object(file, location.offset, location.length, index.fqn)
        file = weights / "common.pt"
        if file.is_file():
            _read_object(file, 0, file.stat().st_size, "it")
    except _Refused as refused:
        raise UserError(
            f"{key}: {file} is a pickle that names {refused}, which no checkpoint needs and which could run code. Use "
            f"another checkpoint, or model.allow_pickle=true (export-hf: --allow-pickle) if you trust its author."
        ) from None
    except _Short as short:
        raise UserError(f"{key}: {checkpoint} is incomplete ({short}). Name a complete checkpoint.") from None
    except Exception as error:  # torch, pickle and the file system raise different classes
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{key}: {file} cannot be read ({reason}). Name a complete checkpoint.") from None


def read_metadata(checkpoint: Path, *, trusted: bool = False) -> Any:
    """Read ``weights/.metadata``, torch's ``Metadata``: which tensor is stored where.

    Args:
        trusted: it may reference anything, and is unpickled by torch itself.
    """
    if trusted:
        from torch.distributed.checkpoint import FileSystemReader

        return FileSystemReader(weights_of(checkpoint)).read_metadata()
    return _Records(io.BytesIO((weights_of(checkpoint) / ".metadata").read_bytes())).load()


class _Refused(Exception):
    """A pickle references something that is not allowed, named in the message."""


class _Short(Exception):
    """A file ends too early, named in the message."""


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module, name = _STAND_INS.get((module, name), (module, name))
        if "." not in name:  # a dotted name would walk from one object to another
            if (module, name) in _NAMES:
                return getattr(importlib.import_module(module), name)
            if module in _RECORDS:
                found = getattr(importlib.import_module(module), name, None)
                if isinstance(found, type) and found.__module__ == module:
                    return found
            if module == "torch" and _is_dtype(name):
                return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


def _is_dtype(name: str) -> bool:
    import torch

    return isinstance(getattr(torch, name, None), torch.dtype)


def _objects(metadata: Any) -> list[tuple[Any, Any]]:
    """Return (index, location) of the objects stored beside the tensors."""
    kinds = metadata.state_dict_metadata
    return [
        (index, location)
        for index, location in metadata.storage_data.items()
        if type(kinds.get(index.fqn)).__name__ == "BytesStorageMetadata"
    ]


def _read_object(file: Path, offset: int, length: int, name: str) -> None:
    import torch

    with file.open("rb") as opened:
        opened.seek(offset)
        stored = io.BytesIO(opened.read(length))
    if len(stored.getvalue()) < length:
        raise _Short(f"{file.parent.name}/{file.name} has {file.stat().st_size} of {offset + length} bytes")
    try:
        found = torch.load(stored, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(stored.getvalue()))
        if unsafe:
            raise _Refused(f"{', '.join(unsafe)} (in {name})") from None
        raise error
    if isinstance(found, torch.Tensor) and found.dtype == torch.uint8 and found.numel():
        _Quantization(io.BytesIO(found.numpy().tobytes())).load()


class _Quantization(pickle.Unpickler):
    """Unpickles the extra state of Transformer Engine's layers: tensors, numbers and strings."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _STORED:
            return lambda stored: torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        if (module, name) in _OF_TENSORS or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")
