"""Finding checkpoints on disk, and refusing damaged ones and those of another model before anything is built."""

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
_OWN = re.compile(r"step=\d+(-last)?(-v\d+)?")  # names that a run gives


def last_checkpoint(run_dir: Path) -> Path | None:
    """The finished checkpoint of a run with the highest step, or ``None``.

    One that was interrupted while it was written never counts, whatever its name.
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
    """Mark a checkpoint as being written, or take the mark away; on one rank."""
    marker = checkpoint.with_name(checkpoint.name + _UNFINISHED)
    if unfinished:
        marker.touch()
    else:
        marker.unlink(missing_ok=True)


def step_of(folder: Path) -> int:
    """Optimizer steps that a checkpoint holds, from its name; -1 where the name does not say."""
    found = re.search(r"step=(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what was being written or removed when a run was killed, and its markers; on one rank.

    Args:
        folder: ``checkpoints`` of a run that is not running; none but its own ``step=N`` are touched.

    Returns:
        the names of what was removed.
    """
    markers = {marker.name.removesuffix(_UNFINISHED): marker for marker in folder.glob(f"*{_UNFINISHED}")}
    own = {name: marker for name, marker in markers.items() if _OWN.fullmatch(name)}
    # A link to a checkpoint that was being removed is nothing without it.
    links = {link.name for link in folder.iterdir() if link.is_symlink() and link.readlink().name in own} if own else ()
    removed = remove_checkpoints(folder, {*own, *links})
    for marker in own.values():
        marker.unlink(missing_ok=True)
    return removed


def remove_checkpoints(folder: Path, names: Iterable[str]) -> list[str]:
    """Remove checkpoints or links to them, if present; none but a run's own ``step=N``. Returns their names."""
    removed = []
    for name in sorted(names):
        path = folder / name
        if not _OWN.fullmatch(name) or not (path.is_symlink() or path.is_dir()):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            marker = path.with_name(name + _UNFINISHED)
            marker.touch()  # a kill within this leaves no half that looks whole
            shutil.rmtree(path)
            marker.unlink(missing_ok=True)
        removed.append(name)
    return removed


def resolve_checkpoint(path: str, key: str) -> Path:
    """The checkpoint folder that a user names: itself, or the last one of a run folder.

    Raises:
        UserError: there is none; of a Hugging Face model, how to make one of it.
    """
    folder = Path(path).expanduser().absolute()
    refuse_hugging_face(path, key)
    if is_checkpoint(folder):
        if _is_unfinished(folder):
            raise UserError(f"{key}: {folder} was interrupted while it was written; name a finished checkpoint")
        return folder
    found = last_checkpoint(folder) or latest_of_bridge(folder)
    if found is None:
        raise UserError(
            f"{key}: {folder} is neither a NeMo checkpoint (a folder with weights/) nor a run folder with a finished "
            "one in checkpoints/, nor one of Megatron-Bridge (iter_0000100)"
        )
    return found


def refuse_hugging_face(path: str, key: str) -> None:
    """Refuse a model in Hugging Face's format where NeMo's is needed: a folder, or a name such as ORG/NAME.

    Raises:
        UserError: names the command that makes a NeMo checkpoint of it.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.exists():
        if _HUB_NAME.fullmatch(path):
            raise UserError(
                f"{key}={path}: no such folder; give the folder of a NeMo checkpoint (of a model on huggingface.co, "
                f"nemo-rao import-hf {path} DEST makes one)"
            )
        return
    if (found := hugging_face_file(folder)) is not None:
        raise UserError(
            f"{key}={path}: is a model in Hugging Face's format (it has {found}), not a NeMo checkpoint; make one of "
            f"it, and name that: nemo-rao import-hf {shlex.quote(path)} DEST"
        )


def hugging_face_file(folder: Path) -> str | None:
    """The name of a file that shows that ``folder`` is a model in Hugging Face's format; ``None`` where it is not."""
    if is_checkpoint(folder) or (folder / "checkpoints").is_dir():
        return None
    names = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
    return next((file.name for name in names for file in sorted(folder.glob(name))), None)


def check_checkpoint(
    checkpoint: Path, config: Any, vocab_size: int | None, *, key: str, remedy: str, trusted: bool = False
) -> None:
    """Compare a distributed checkpoint's files and global shapes with a model config, without loading a tensor.

    Args:
        checkpoint: folder with ``weights/``.
        config: a NeMo GPT config, or its sizes; what is ``None`` is not compared.
        vocab_size: V without padding; ``None``: not known.
        key: where the user named the checkpoint, for the message.
        remedy: what to do about other sizes.
        trusted: its pickles may name anything; see :mod:`nemo_rao.checkpoint.pickles`.

    Raises:
        UserError: the checkpoint cannot be read, could run code, is not whole, or has other sizes.
    """
    if not trusted:
        refuse_code(checkpoint, key)
    try:
        shapes = {name: shape for name, (shape, _) in stored_tensors(checkpoint, trusted=trusted).items()}
        damaged = _damaged_files(weights_of(checkpoint), read_metadata(checkpoint, trusted=trusted))
    except Exception as error:  # torch, megatron-core and the file system each raise their own
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"{key}: {checkpoint} cannot be read ({reason}); name a complete checkpoint") from None
    if damaged:
        raise UserError(f"{key}: {checkpoint} is not whole ({'; '.join(damaged[:3])}); name a complete checkpoint")
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
            raise UserError(f"{key}: {checkpoint} has {name} {found}, the model {wanted}; {remedy}")
    rows = _size(shapes, "embedding.word_embeddings.weight", 0)
    if rows is not None and vocab_size is not None and rows < vocab_size:
        raise UserError(f"{key}: {checkpoint} has {rows} token embeddings, the tokenizer {vocab_size} tokens; {remedy}")


def _size(shapes: dict[str, tuple[int, ...]], name: str, axis: int) -> int | None:
    """A global size; ``None`` where the checkpoint names its tensors otherwise."""
    return shapes[name][axis] if name in shapes and axis < len(shapes[name]) else None


def stored_tensors(checkpoint: Path, *, trusted: bool = False) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each of the model's tensors, by its name without ``module.``; not the optimizer's.

    Args:
        trusted: its pickles may name anything; see :mod:`nemo_rao.checkpoint.pickles`.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = read_metadata(checkpoint, trusted=trusted).state_dict_metadata
    return {
        plain: (tuple(found[name].size), str(found[name].properties.dtype).removeprefix("torch."))
        for name, plain in names_of_model(found).items()
        if isinstance(found[name], TensorStorageMetadata)
    }


def token_embeddings(checkpoint: Path, *, trusted: bool = False) -> int | None:
    """Rows of the embedding, padding included; ``None`` where the checkpoint names its tensors otherwise."""
    shapes = {name: shape for name, (shape, _) in stored_tensors(checkpoint, trusted=trusted).items()}
    return _size(shapes, "embedding.word_embeddings.weight", 0)


def _damaged_files(weights: Path, metadata: Any) -> list[str]:
    """Files of a ``torch_dist`` checkpoint that are missing, or shorter than what its metadata says lies in them."""
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
