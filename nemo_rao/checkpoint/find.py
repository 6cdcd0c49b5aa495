"""Find checkpoints on disk, and refuse damaged ones and those of other models before anything is built."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.layout import is_checkpoint, latest_of_bridge, names_of_model, weights_of
from nemo_rao.checkpoint.pickles import read_metadata, refuse_code
from nemo_rao.errors import UserError

_UNFINISHED = "-unfinished"  # NeMo's marker file beside a checkpoint that is being written or removed
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # ORG/NAME
_OWN = re.compile(r"step=\d+(-last)?(-v\d+)?")  # names of checkpoints that runs write


def last_checkpoint(run_dir: Path) -> Path | None:
    """Return the complete checkpoint of a run with the highest step, or ``None``.

    A checkpoint that was interrupted while being written never counts, whatever its name.
    """
    finished = [
        folder
        for folder in (run_dir / "checkpoints").glob("*")
        if (folder / "weights").is_dir() and not _is_unfinished(folder)
    ]
    return max(finished, key=lambda folder: (step_of(folder), folder.name), default=None)


def _is_unfinished(folder: Path) -> bool:
    return folder.with_name(folder.name + _UNFINISHED).exists()


def mark_unfinished(checkpoint: Path, unfinished: bool) -> None:
    """Mark a checkpoint as being written, or remove the mark; on one rank."""
    marker = checkpoint.with_name(checkpoint.name + _UNFINISHED)
    if unfinished:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def step_of(folder: Path) -> int:
    """Return the optimizer steps of a checkpoint from its name; -1 if the name does not contain it."""
    found = re.search(r"step=(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def remove_unfinished(folder: Path) -> list[str]:
    """Remove checkpoints that were being written or removed when a run was killed, and their markers; on one rank.

    Args:
        folder: ``checkpoints`` of a run that is not running; only entries named ``step=N`` are removed.

    Returns:
        the names of the removed checkpoints.
    """
    markers = {marker.name.removesuffix(_UNFINISHED): marker for marker in folder.glob(f"*{_UNFINISHED}")}
    own = {name: marker for name, marker in markers.items() if _OWN.fullmatch(name)}
    # A link to a checkpoint that was being removed is useless without it.
    links = {link.name for link in folder.iterdir() if link.is_symlink() and link.readlink().name in own} if own else ()
    removed = remove_checkpoints(folder, {*own, *links})
    for marker in own.values():
        marker.unlink(missing_ok=True)
    return removed


def remove_checkpoints(folder: Path, names: Iterable[str]) -> list[str]:
    """Remove checkpoints or links to them, if present and named ``step=N``. Return their names."""
    removed = []
    for name in sorted(names):
        path = folder / name
        if not _OWN.fullmatch(name) or not (path.is_symlink() or path.is_dir()):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            marker = path.with_name(name + _UNFINISHED)
            marker.touch()  # if killed, a half-removed checkpoint must not look complete
            shutil.rmtree(path)
            marker.unlink(missing_ok=True)
        removed.append(name)
    return removed


def resolve_checkpoint(path: str, key: str) -> Path:
    """Return the checkpoint directory that a user names: itself, or the last one of a run's directory.

    Raises:
        UserError: there is none; for a Hugging Face model, the message says how to convert it.
    """
    folder = Path(path).expanduser().absolute()
    refuse_hugging_face(path, key)
    if is_checkpoint(folder):
        if _is_unfinished(folder):
            raise UserError(f"{key}: {folder} was interrupted while being written. Name a complete checkpoint.")
        return folder
    found = last_checkpoint(folder) or latest_of_bridge(folder)
    if found is None:
        raise UserError(
            f"{key}: {folder} is neither a checkpoint of NeMo (a directory with weights/) or of Megatron-Bridge "
            "(iter_0000100), nor a run's directory with a complete one in checkpoints/. Name one of these."
        )
    return found


def refuse_hugging_face(path: str, key: str) -> None:
    """Refuse a model in Hugging Face's format (a directory, or a name such as ORG/NAME) where a checkpoint is needed.

    Raises:
        UserError: names the command that converts it.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        if _HUB_NAME.fullmatch(path):
            raise UserError(
                f"{key}={path}: no such directory. Give the directory of a checkpoint (nemo-rao import-hf {path} DEST "
                "makes one from a model on huggingface.co)."
            )
        return
    if (found := hugging_face_file(folder)) is not None:
        raise UserError(
            f"{key}={path}: is a model in Hugging Face's format (it has {found}), not a checkpoint. Convert it, and "
            f"name the result: nemo-rao import-hf {shlex.quote(path)} DEST"
        )


def hugging_face_file(folder: Path) -> str | None:
    """Return a file that identifies ``folder`` as a model in Hugging Face's format; ``None`` if it is not."""
    if is_checkpoint(folder) or (folder / "checkpoints").is_dir():
        return None
    names = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
    return next((file.name for name in names for file in sorted(folder.glob(name))), None)


def check_checkpoint(
    checkpoint: Path, config: Any, vocab_size: int | None, *, key: str, remedy: str, trusted: bool = False
) -> None:
    """Compare a distributed checkpoint's files and global shapes with a model config, without loading a tensor.

    Args:
        checkpoint: directory with ``weights/``.
        config: a NeMo GPT config, or its sizes; ``None`` values are not compared.
        vocab_size: V without padding; ``None``: unknown.
        key: key or option by which the user named the checkpoint, for messages.
        remedy: what to do about other sizes.
        trusted: its pickles may reference anything; see :mod:`nemo_rao.checkpoint.pickles`.

    Raises:
        UserError: the checkpoint cannot be read, could run code, is incomplete, or has other sizes.
    """
    if not trusted:
        refuse_code(checkpoint, key)
    try:
        shapes = {name: shape for name, (shape, _) in stored_tensors(checkpoint, trusted=trusted).items()}
        damaged = _damaged_files(weights_of(checkpoint), read_metadata(checkpoint, trusted=trusted))
    except Exception as error:  # torch, megatron-core and the file system raise different classes
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{key}: {checkpoint} cannot be read ({reason}). Name a complete checkpoint.") from None
    if damaged:
        raise UserError(f"{key}: {checkpoint} is incomplete ({'; '.join(damaged[:3])}). Name a complete checkpoint.")
    heads = config.num_attention_heads
    kv_channels = config.kv_channels or (config.hidden_size // heads if config.hidden_size and heads else None)
    num_groups = config.num_query_groups or heads
    layers = "decoder.layers."
    found_and_wanted = {
        "hidden_size": (_size(shapes, "embedding.word_embeddings.weight", 1), config.hidden_size),
        "num_layers": (_size(shapes, layers + "self_attention.linear_proj.weight", 0), config.num_layers),
        "ffn_hidden_size": (_size(shapes, layers + "mlp.linear_fc2.weight", 2), config.ffn_hidden_size),
        "num_attention_heads x kv_channels": (
            _size(shapes, layers + "self_attention.linear_proj.weight", 2),
            heads * kv_channels if heads and kv_channels else None,
        ),
        "(num_attention_heads + 2 x num_query_groups) x kv_channels": (
            _size(shapes, layers + "self_attention.linear_qkv.weight", 1),
            (heads + 2 * num_groups) * kv_channels if heads and kv_channels else None,
        ),
    }
    for name, (found, wanted) in found_and_wanted.items():
        if found is not None and wanted is not None and found != wanted:
            raise UserError(f"{key}: {checkpoint} has {name} {found}, but the model {wanted}; {remedy}.")
    rows = _size(shapes, "embedding.word_embeddings.weight", 0)
    if rows is not None and vocab_size is not None and rows < vocab_size:
        raise UserError(
            f"{key}: {checkpoint} has {rows} token embeddings, the tokenizer {vocab_size} tokens; {remedy}."
        )


def _size(shapes: dict[str, tuple[int, ...]], name: str, axis: int) -> int | None:
    """Return a global size; ``None`` if the checkpoint names its tensors differently."""
    return shapes[name][axis] if name in shapes and axis < len(shapes[name]) else None


def stored_tensors(checkpoint: Path, *, trusted: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the model's tensors, by name without ``module.``; without the optimizer's.

    Args:
        trusted: its pickles may reference anything; see :mod:`nemo_rao.checkpoint.pickles`.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = read_metadata(checkpoint, trusted=trusted).state_dict_metadata
    return {
        plain: (tuple(found[name].size), str(found[name].properties.dtype).removeprefix("torch."))
        for name, plain in names_of_model(found).items()
        if isinstance(found[name], TensorStorageMetadata)
    }


def token_embeddings(checkpoint: Path, *, trusted: bool = False) -> int | None:
    """Return the rows of the embedding, padding included; ``None`` if the tensors are named differently."""
    shapes = {name: shape for name, (shape, _) in stored_tensors(checkpoint, trusted=trusted).items()}
    return _size(shapes, "embedding.word_embeddings.weight", 0)


def _damaged_files(weights: Path, metadata: Any) -> list[str]:
    """List files of a ``torch_dist`` checkpoint that are missing, or shorter than its metadata requires."""
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    damaged = []
    for name, end in sorted(ends.items()):
        if not (weights / name).is_file():
            damaged.append(f"{weights.name}/{name} is missing")
        elif (size := (weights / name).stat().st_size) < end:
            damaged.append(f"{weights.name}/{name} has {size} of {end} bytes")
    return damaged
