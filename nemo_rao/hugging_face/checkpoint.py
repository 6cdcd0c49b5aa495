"""Tensors of the checkpoint to export."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import names_of_model, stored_tensors
from nemo_rao.checkpoint.pickles import read_metadata
from nemo_rao.runtime.console import say

LAYERS = "decoder.layers."
SCORE_HEAD = "score_head.weight"  # of a reward model


def report_left_behind(names: Iterable[str]) -> None:
    """Report the tensors of a checkpoint that cannot be part of an exported model.

    Args:
        names: tensors outside the model; a reward model's head is exported and therefore not reported.
    """
    left_behind = sorted(name for name in names if name != SCORE_HEAD and not name.endswith("_extra_state"))
    if left_behind:
        say(f"not exported, as transformers has no counterpart: {', '.join(left_behind)}")


def read_tensors(checkpoint: Path, num_layers: int, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """Read the model's full tensors by Megatron's names; tensors stacked over all layers are split by layer.

    Args:
        only: names to read; ``None``: all.
    """
    import torch
    from torch.distributed import checkpoint as torch_checkpoint

    described = stored_tensors(checkpoint, trusted=True)
    full_names = names_of_model(read_metadata(checkpoint, trusted=True).state_dict_metadata)
    stored = {name: full_name for full_name, name in full_names.items() if name in described}
    tensors = {
        stored[name]: torch.empty(shape, dtype=vars(torch)[dtype])
        for name, (shape, dtype) in described.items()
        if not name.endswith("_extra_state") and (only is None or name in only)
    }
    reader = torch_checkpoint.FileSystemReader(checkpoint / "weights")
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    found = {}
    for name in stored:
        if (tensor := tensors.get(stored[name])) is None:
            continue
        rest = name.removeprefix(LAYERS)
        if rest == name or rest[:1].isdigit():
            found[name] = tensor
        else:
            assert len(tensor) == num_layers, (name, tensor.shape)
            found |= {f"{LAYERS}{number}.{rest}": tensor[number] for number in range(num_layers)}
    return found
