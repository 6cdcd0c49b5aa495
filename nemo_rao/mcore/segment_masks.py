"""Attention masks of a table of segments for FlexAttention: a function of two tokens, and a block mask.

The table is that of :class:`nemo_rao.batch.MicroBatch`. Tokens are numbered through all sequences, ``L = B T``. Token q
sees two ranges, in its own segment and in the prompt that this segment continues:

    first[q] <= k <= q    and    prompt_first[q] <= k < prompt_end[q]

A sliding window only moves the beginnings of both. A padding token sees only itself, because a softmax over nothing is
undefined.

The block mask lists which blocks of 128 x 128 tokens are skipped, computed without a mask, or computed with the
function above. PyTorch's ``create_block_mask`` evaluates that function for every pair of tokens. Here the blocks follow
from pieces, the parts of segments within one block of queries: the first and last token of a piece bound what the
others see. That takes ``(S + L/128) L/128`` numbers, without a loop over segments and without a synchronization.

Legend: ``S`` segments, ``L`` tokens, ``N = ceil(L / 128)`` blocks, ``P = S + N`` pieces, some of them empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128


class Seen(NamedTuple):
    """The ranges that each token sees: ``[L]`` int32 each."""

    first: Tensor
    prompt_first: Tensor
    prompt_end: Tensor

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return FlexAttention's function of (batch, head, query, key)."""
        first, prompt_first, prompt_end = self

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ((k >= first[q]) & (k <= q)) | ((k >= prompt_first[q]) & (k < prompt_end[q]))

        return sees


def seen_by(table: Tensor, num_tokens: int, *, window: int | None = None) -> Seen:
    """Compute the ranges that each token sees.

    Args:
        table: ``[S, 3]`` int64, on any device; its segments fill ``num_tokens``.
        window: number of previous tokens of the same row that a token sees; ``None`` for all.
    """
    ends = table[:, 0].cumsum(0)
    starts = ends - table[:, 0]
    token = torch.arange(num_tokens, device=table.device)
    segment = torch.searchsorted(ends, token, right=True)
    continued = table[:, 1]
    continues = (continued >= 0)[segment]
    prompt = continued.clamp(min=0)[segment]
    prompt_first = torch.where(continues, starts[prompt], 0)
    prompt_end = torch.where(continues, ends[prompt], 0)
    first = torch.where(table[:, 2].bool()[segment], token, starts[segment])
    if window is not None:
        position = token - starts[segment] + (prompt_end - prompt_first)  # within the row
        prompt_first = torch.minimum(prompt_first + (position - window).clamp(min=0), prompt_end)
        first = torch.maximum(first, token - window)
    return Seen(first.int(), prompt_first.int(), prompt_end.int())


def block_mask(table: Tensor, num_tokens: int, *, window: int | None = None) -> BlockMask:
    """Build FlexAttention's mask for one sequence of ``num_tokens``; for the arguments see :func:`seen_by`."""
    seen = seen_by(table, num_tokens, window=window)
    partly, fully = _blocks(table, num_tokens, seen)
    return BlockMask.from_kv_blocks(
        *_listed(partly),
        *_listed(fully),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen.mask_mod(),
        seq_lengths=(num_tokens, num_tokens),
    )


def _blocks(table: Tensor, num_tokens: int, seen: Seen) -> tuple[Tensor, Tensor]:
    """Return ``[N, N]`` bool each: blocks that queries see partially, and blocks that every query sees completely."""
    device = table.device
    blocks = torch.arange(0, num_tokens, BLOCK, device=device)
    starts = table[:, 0].cumsum(0) - table[:, 0]
    begins = torch.cat([starts, blocks]).sort().values
    ends = torch.cat([begins[1:], begins.new_full((1,), num_tokens)])
    first, last = begins.clamp(max=num_tokens - 1), (ends - 1).clamp(min=0)  # tokens of a piece

    def overlap(start: Tensor, end: Tensor) -> Tensor:
        """Return ``[P, N]``: number of tokens that ranges ``[start, end)`` and blocks have in common."""
        common = torch.minimum(end[:, None], (blocks + BLOCK).clamp(max=num_tokens)) - torch.maximum(
            start[:, None], blocks
        )
        return common.clamp(min=0)

    # Within a piece, the bounds of both ranges only grow, and the ranges never overlap.
    by_some = overlap(seen.first[first], last + 1) + overlap(seen.prompt_first[first], seen.prompt_end[first])
    by_all = overlap(seen.first[last], first + 1) + overlap(seen.prompt_first[last], seen.prompt_end[last])
    is_piece = (ends > begins)[:, None]
    block_of = first // BLOCK
    nothing = torch.zeros(len(blocks), len(blocks), dtype=torch.int32, device=device)
    some = nothing.index_add(0, block_of, (is_piece & (by_some > 0)).int()) > 0
    not_all = nothing.index_add(0, block_of, (is_piece & (by_all < BLOCK)).int()) > 0
    # A block of queries that extends beyond the last token is computed with the function, as in PyTorch.
    fully = ~not_all & (blocks + BLOCK <= num_tokens)[:, None]
    return some & ~fully, fully


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``([1, 1, N], [1, 1, N, N])`` int32: the number of true entries per row, and the columns, true first."""
    number = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return number[None, None], order[None, None]
