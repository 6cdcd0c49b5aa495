"""A vocabulary split over tensor-parallel ranks: columns of each rank, and combined softmax statistics.

Shape legend: ``N`` tokens that are computed, ``V/TP`` columns of one rank, padding included.

Shared by :mod:`nemo_rao.ops.vocab_parallel`, which takes logits, and :mod:`nemo_rao.ops.linear_log_probs`, which
takes hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Columns(NamedTuple):
    """The columns of the vocabulary that this rank holds.

    Attributes:
        first: token of the first column.
        num: number of columns that are tokens; the following ones are padding.
        group: the ranks that hold the vocabulary; ``None`` if it is not split.
    """

    first: int
    num: int
    group: dist.ProcessGroup | None


def columns_of_rank(width: int, vocab_size: int, group: dist.ProcessGroup | None) -> Columns:
    """Return this rank's columns. Those from ``vocab_size`` on are padding.

    Rank i of ``group`` holds columns ``[i * width, (i + 1) * width)``.
    """
    num_ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    assert 0 < vocab_size <= width * num_ranks, (vocab_size, width, num_ranks)
    first = rank * width
    return Columns(first, min(max(vocab_size - first, 0), width), group if num_ranks > 1 else None)


Positions = tuple[Tensor, ...]
"""N positions in a tensor: an index ``[N]`` int64 for each of its leading dimensions."""


def selected(
    targets: Tensor, mask: Tensor | None, positions: Positions | None, vocab_size: int
) -> tuple[Positions, Tensor]:
    """Return ``(positions, targets [N] int64)``: the given positions, or those where ``mask`` is true, row by row.

    Listing positions and checking targets makes the host wait once for a GPU. With given positions it does not wait,
    and their targets are not checked.
    """
    if positions is not None:
        assert mask is None and len(positions) == targets.ndim, (mask, len(positions), targets.shape)
        return positions, targets[positions].long()
    assert mask is None or mask.shape == targets.shape, (mask.shape, targets.shape)
    positions = (torch.ones_like(targets, dtype=torch.bool) if mask is None else mask).nonzero(as_tuple=True)
    chosen = targets[positions].long()
    assert bool(((chosen >= 0) & (chosen < vocab_size)).all()), f"a target is outside [0, {vocab_size})"
    return positions, chosen


def empty_statistics(num_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[N, 3]`` per token: largest logit, sum of exp(x - largest), target's logit, over no columns yet."""
    statistics = like.new_zeros(num_tokens, 3, dtype=dtype)
    statistics[:, 0] = torch.finfo(dtype).min  # finite, so that no infinities are subtracted
    return statistics


def over_all_ranks(local: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Combine each rank's part to largest logit, sum of exp(x - largest) and target's logit ``[N]``.

    One all-gather. It is faster than reductions: a sum can only be reduced once the maximum is known, which costs a
    second exchange. And all ranks combine the same numbers in the same order, so they agree bitwise.

    Args:
        local: ``[N, 3]``, in the layout of :func:`empty_statistics`.
    """
    if group is None:
        largest, total, target_logits = local.unbind(-1)
        return largest, total, target_logits
    num_ranks = dist.get_world_size(group)
    gathered = local.new_empty(num_ranks * local.shape[0], 3)
    dist.all_gather_into_tensor(gathered, local, group=group)
    by_rank = gathered.view(num_ranks, -1, 3)
    largest = by_rank[..., 0].amax(0)
    total = (by_rank[..., 1] * (by_rank[..., 0] - largest).exp()).sum(0)
    return largest, total, by_rank[..., 2].sum(0)  # one rank has the target, the others add 0


def chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
