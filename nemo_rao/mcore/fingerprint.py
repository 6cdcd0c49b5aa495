"""A fingerprint of distributed weights, independent of their distribution.

Every element is hashed together with its index in the whole tensor, and the hashes are summed modulo 2^64: the sum
is the same for any TP, PP and DP, and costs one pass over each rank's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from nemo_rao.mcore.heads import is_of_head

_CHUNK = 1 << 22  # elements hashed at once; bounds the int64 temporaries to a few tens of MiB
# Odd 64-bit constants of the splitmix64 generator, as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = 0xBF58476D1CE4E5B9 - (1 << 64)

_BITS_DTYPE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(sharded_state_dict: Mapping[str, Any], *, vocab_size: int) -> str:
    """Hash a distributed policy's weights. A collective over all ranks, with the same result on each.

    Value and score heads are not part of the policy and are excluded.

    Args:
        sharded_state_dict: this rank's model chunks, as megatron-core's ``sharded_state_dict()`` returns them.
        vocab_size: rows of the embedding beyond it are padding, which depends on TP, and are not hashed.

    Returns:
        16 hexadecimal digits.
    """
    state = dict(sharded_state_dict)
    apply_factories(state)
    total = torch.zeros((), dtype=torch.int64)
    for shard in shards(state):
        # Every replica of a shard holds the same values; exactly one of them has an all-zero replica id.
        if not is_of_head(shard.key) and is_main_replica(shard.replica_id):
            total = total + _hash_shard(shard, vocab_size).cpu()
    if torch.distributed.is_initialized():
        if torch.cuda.is_available():
            total = total.cuda()
        torch.distributed.all_reduce(total)
    return f"{int(total) & (2**64 - 1):016x}"


def shards(state: Any) -> list[ShardedTensor]:
    """Return all shards of a sharded state dict, whose factories have been applied."""
    if isinstance(state, ShardedTensor):
        return [state]
    if isinstance(state, Mapping):
        return [shard for value in state.values() for shard in shards(value)]
    if isinstance(state, (list, tuple)):
        return [shard for value in state for shard in shards(value)]
    return []  # objects such as Transformer Engine's extra state are not weights


def is_main_replica(replica_id: Any) -> bool:
    """Whether this is the id of a shard's main replica, of which there is exactly one."""
    return not any(replica_id) if isinstance(replica_id, tuple) else replica_id == 0


def _hash_shard(shard: ShardedTensor, vocab_size: int) -> Tensor:
    data = shard.data.detach()
    if is_float8tensor(data):  # precision.fp8_param_gather
        data = dequantize_fp8_tensor(data)
    # The leading axes that sharding along layers adds exist only in the global shape.
    extra_axes = len(shard.global_shape) - data.dim()
    origin = 0
    for size, offset in zip(shard.global_shape[:extra_axes], shard.global_offset[:extra_axes], strict=True):
        origin = origin * size + offset
    local_offset = shard.global_offset[extra_axes:]
    if shard.allow_shape_mismatch:  # embedding and output layer, padded to a size that depends on TP
        data = data[: max(0, vocab_size - local_offset[0])]
    # The first axis's size never enters an element's index, so padding it changes nothing.
    row_size = 1
    for size in shard.global_shape[extra_axes + 1 :]:
        row_size *= size
    name_hash = int.from_bytes(
        hashlib.sha256(f"{shard.key}|{origin}|{data.dtype}".encode()).digest()[:8], "big", signed=True
    )
    if data.dim() == 0:
        data, local_offset = data.reshape(1), (0,)

    inner = torch.zeros(data.shape[1:], dtype=torch.int64, device=data.device)
    stride = 1
    for axis in range(data.dim() - 1, 0, -1):
        index = torch.arange(data.shape[axis], device=data.device) + local_offset[axis]
        inner += (index * stride).reshape([-1] + [1] * (data.dim() - 1 - axis))
        stride *= shard.global_shape[extra_axes + axis]

    total = torch.zeros((), dtype=torch.int64, device=data.device)
    rows_at_once = max(1, _CHUNK // max(1, inner.numel()))
    for start in range(0, data.shape[0], rows_at_once):
        rows = data[start : start + rows_at_once]
        row_index = torch.arange(start, start + rows.shape[0], device=data.device) + local_offset[0]
        indices = (row_index * row_size).reshape([-1] + [1] * (data.dim() - 1)) + inner
        bits = rows.contiguous().view(_BITS_DTYPE[rows.element_size()]).to(torch.int64)
        total += _mix(indices * _GOLDEN + name_hash + _mix(bits)).sum()
    return total


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection of 64-bit integers that spreads every bit (splitmix64's finalizer, arithmetic shifts)."""
    x = (x ^ (x >> 30)) * _MIX
    return x ^ (x >> 27)
