"""Finding checkpoints on disk, and refusing damaged ones and those of another model before anything is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.integration.pickles import read_metadata, refuse_code

_UNFINISHED = "-unfinished"  # NeMo's marker file beside a checkpoint that is being written or removed


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


def step_of(folder: Path) -> int:
    """Optimizer steps that a checkpoint holds, from its name; -1 where the name does not say."""
    found = re.search(r"step=(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def resolve_checkpoint(path: str, key: str) -> Path:
    """The checkpoint folder that a user names: itself, or the last one of a run folder.

    Raises:
        UserError: there is none.
    """
    folder = Path(path).expanduser().absolute()
    if (folder / "weights").is_dir():
        if _is_unfinished(folder):
            raise UserError(f"{key}: {folder} was interrupted while it was written; name a finished checkpoint")
        return folder
    found = last_checkpoint(folder)
    if found is None:
        raise UserError(
            f"{key}: {folder} is neither a NeMo checkpoint (a folder with weights/) nor a run folder with a finished "
            "one in checkpoints/"
        )
    return found


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
        trusted: its pickles may name anything; see :mod:`nemo_rao.integration.pickles`.

    Raises:
        UserError: the checkpoint cannot be read, could run code, is not whole, or has other sizes.
    """
    if not trusted:
        refuse_code(checkpoint, key)
    try:
        shapes = {name: shape for name, (shape, _) in stored_tensors(checkpoint, trusted=trusted).items()}
        damaged = _damaged_files(checkpoint / "weights", read_metadata(checkpoint, trusted=trusted))
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
        trusted: its pickles may name anything; see :mod:`nemo_rao.integration.pickles`.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = read_metadata(checkpoint, trusted=trusted).state_dict_metadata
    return {
        name.removeprefix("module."): (tuple(tensor.size), str(tensor.properties.dtype).removeprefix("torch."))
        for name, tensor in found.items()
        if isinstance(tensor, TensorStorageMetadata) and name.startswith("module.")
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
            damaged.append(f"weights/{name} is missing")
        elif (size := (weights / name).stat().st_size) < end:
            damaged.append(f"weights/{name} has {size} of {end} bytes")
    return damaged
