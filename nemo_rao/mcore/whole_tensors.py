"""A model's whole tensors, with their names in checkpoints, on rank 0, one after another.

The location of a rank's part in a tensor is read from the sharded state dict, as for checkpoints, and so is correct
under any tensor, pipeline and virtual pipeline parallelism. Rank 0 holds only the current tensor in addition to its
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from nemo_rao.mcore.checkpoint import sharded_model
from nemo_rao.mcore.fingerprint import is_main_replica, shards
from nemo_rao.mcore.heads import is_of_head

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class _Part:
    """A rank's part of a tensor.

    Attributes:
        name: name of the tensor, with its layer's number.
        number: index of the part on its rank.
        shape: shape of the tensor; ranges: the part in it, (start, end) along each axis.
    """

    name: str
    rank: int
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


def whole_tensors(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) on rank 0, on the model's device; nothing on other ranks. Value and score heads are
    excluded.

    Adapters come first; then the model from its embeddings to its output layer, layer by layer. A collective of all
    ranks, each of which must exhaust the iterator.

    Args:
        chunks: this rank's model chunks.
    """
    state = sharded_model(chunks)
    apply_factories(state)
    own = [shard for shard in shards(state) if is_main_replica(shard.replica_id) and not is_of_head(shard.key)]
    rank = torch.distributed.get_rank()
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, [_part(shard, rank, i) for i, shard in enumerate(own)])
    tensors: dict[str, list[_Part]] = {}
    for part in (part for of_rank in of_ranks for part in of_rank):
        tensors.setdefault(part.name, []).append(part)
    for name in sorted(tensors, key=_order):
        whole: Tensor | None = None
        for part in tensors[name]:
            if part.rank == rank:
                data = own[part.number].data.detach()
            if rank == 0:
                if whole is None:
                    whole = torch.empty(part.shape, dtype=part.dtype, device=own[0].data.device)
                target = whole[tuple(slice(start, end) for start, end in part.ranges)]
                target.copy_(data if part.rank == 0 else _received(target, part.rank))
            elif part.rank == rank:
                torch.distributed.send(data.contiguous(), 0)
        if whole is not None:
            yield name, whole


def _part(shard: ShardedTensor, rank: int, number: int) -> _Part:
    data = shard.data
    # Leading axes added by sharding along layers; there is one if all layers are of one kind.
    extra = len(shard.global_shape) - data.dim()
    name, rest = shard.key, shard.key.removeprefix(_LAYERS)
    if extra:
        assert extra == 1 and rest != name, f"{name}: {shard.global_shape}"
        name = f"{_LAYERS}{shard.global_offset[0]}.{rest}"
    ranges = tuple((start, start + size) for start, size in zip(shard.global_offset[extra:], data.shape, strict=True))
    return _Part(name, rank, number, data.dtype, tuple(shard.global_shape[extra:]), ranges)


def _order(name: str) -> tuple[int, int, str]:
    """Sort key: adapters, embeddings, layers by number, then the rest."""
    if ".adapter." in name:
        return 0, 0, name
    rest = name.removeprefix(_LAYERS)
    if rest == name:
        return (1 if name.startswith("embedding.") else 3), 0, name
    return 2, int(rest.partition(".")[0]), name


def _received(like: Tensor, rank: int) -> Tensor:
    buffer = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    torch.distributed.recv(buffer, rank)
    return buffer
