"""A vocabulary split over tensor-parallel ranks: which columns are whose, and softmax statistics put together.

Shape legend: ``N`` tokens that are computed, ``V/TP`` columns of one rank, padding included.

Shared by :mod:`nemo_rao.ops.vocab_parallel`, which is given logits, and :mod:`nemo_rao.ops.linear_log_probs`, which is
given hidden states.
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
        first: the token that the first of them stands for.
        num: how many are tokens; those behind are padding.
        group: the ranks that hold the others, ``None`` where there are none.
    """

    first: int
    num: int
    group: dist.ProcessGroup | None


def columns_of_rank(width: int, vocab_size: int, group: dist.ProcessGroup | None) -> Columns:
    """Rank i of ``group`` holds columns ``[i * width, (i + 1) * width)``; those from ``vocab_size`` on are padding."""
    num_ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    assert 0 < vocab_size <= width * num_ranks, (vocab_size, width, num_ranks)
    first = rank * width
    return Columns(first, min(max(vocab_size - first, 0), width), group if num_ranks > 1 else None)


Positions = tuple[Tensor, ...]
"""N places of a tensor: for each of its leading dimensions an index ``[N]`` int64."""


def selected(
    targets: Tensor, mask: Tensor | None, positions: Positions | None, vocab_size: int
) -> tuple[Positions, Tensor]:
    """``(positions, targets [N] int64)``: those that are given, else where ``mask`` is true, row by row.

    To list positions and check the targets, on a GPU the host waits once for the device; it does not for positions that
    are given, whose targets are taken on trust.
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
    """``[N, 3]``: of each token the largest logit, the sum of exp(x - largest), the target's logit, over no column."""
    statistics = like.new_zeros(num_tokens, 3, dtype=dtype)
    statistics[:, 0] = torch.finfo(dtype).min  # finite, so that nothing subtracts infinities
    return statistics


def over_all_ranks(local: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(x - largest) and target's logit ``[N]`` over the vocabulary, from each rank's share.

    One all-gather. It beats reducing: a sum can only be reduced once the maximum is known, which costs a second
    exchange, and all ranks combine the same numbers in the same order, so that they agree bitwise.

    Args:
        local: ``[N, 3]``, as :func:`empty_statistics` lays it out.
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
