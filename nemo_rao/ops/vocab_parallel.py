"""Log-probabilities of given tokens, from logits whose vocabulary is split over tensor-parallel ranks.

Shape legend: ``N`` tokens that are computed, ``n`` tokens of one chunk, ``v`` vocabulary columns of this rank,
without padding (``v <= V/TP``).

Per token, with x the logits, t the target and M the largest logit of all ranks:

    log p(t) = (x_t - M) - log S,    S = sum_j exp(x_j - M),    d log p(t) / d x_j = [j = t] - exp(x_j - M) / S

M is subtracted before summation, so that logits far from zero lose no precision.

Memory: logits at Llama 3's vocabulary take 0.25 MiB per token in bf16 and 0.5 MiB in fp32, so copies are made one chunk
of tokens at a time: in fp32, or in the logits' dtype for a GPU's kernels, which widen them as they read
(:mod:`nemo_rao.ops.logit_blocks`). Backward recomputes them from the saved logits and 8 bytes per token (M, S), and
writes the gradient chunk by chunk. Apart from that gradient, a second copy of the logits never exists.

Communication: one all-gather of ``[N, 3]`` in forward (each rank's maximum, sum and target logit), none in backward.

Alternative considered: Megatron's ``vocab_parallel_cross_entropy``, which overwrites the logits, holds them all in
fp32, includes the padding columns in the softmax and needs three exchanges.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rao.ops.logit_blocks import Tokens, logit_blocks_for
from nemo_rao.ops.vocabulary import (
    Positions,
    chunks,
    columns_of_rank,
    empty_statistics,
    over_all_ranks,
    selected,
)
from nemo_rao.ops.workspace import CHUNK_BYTES


def vocab_parallel_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
    positions: Positions | None = None,
    num_trained: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Compute log p(target) at every position, in nats.

    A collective of ``group`` in forward: all of its ranks must call it with the same targets and mask. Backward expects
    the same upstream gradient on all of them, which holds if each computes the same loss; each returns the gradient of
    its columns. Without ``positions``, the host waits once for a GPU, to list them and to check the targets.

    Args:
        logits: ``[..., V/TP]`` of any float dtype and memory layout; rank i of ``group`` holds columns
            ``[i * V/TP, (i + 1) * V/TP)``. Never modified.
        targets: ``[...]`` integers in [0, vocab_size), the same on every rank.
        vocab_size: V without padding. Columns from there on are excluded from the softmax and get zero gradient.
        group: the tensor-parallel ranks; ``None`` for one.
        mask: ``[...]`` bool. Where false, nothing is computed: the result and the gradient are zero, for any logits and
            target.
        positions: instead of a mask, the N positions to compute, if the caller knows them: the host does not wait for a
            GPU, and targets are not checked.
        num_trained: the first ``num_trained`` of ``positions`` carry a gradient, the others are constants without
            backward computation; ``None`` for all.
        chunk_bytes: bytes of fp32 logits held at a time; at least those of one token.

    Returns:
        ``[...]`` float32, or float64 for float64 logits; the same on every rank of ``group``.
    """
    assert logits.shape[:-1] == targets.shape and targets.ndim > 0, (logits.shape, targets.shape)
    columns = columns_of_rank(logits.shape[-1], vocab_size, group)
    positions, chosen = selected(targets, mask, positions, vocab_size)
    assert num_trained is None or 0 <= num_trained <= len(chosen), (num_trained, len(chosen))
    return _LogProbs.apply(
        logits, chosen - columns.first, positions, num_trained, columns.num, columns.group, chunk_bytes
    )


class _LogProbs(torch.autograd.Function):
    """:func:`vocab_parallel_log_probs` at listed positions, zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        local_targets: Tensor,
        positions: Positions,
        num_trained: int | None,
        num_columns: int,
        group: dist.ProcessGroup | None,
        chunk_bytes: int,
    ) -> Tensor:
        """``local_targets`` ``[N]`` count from this rank's first column; ``positions`` index them in ``[...]``."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        columns = logits[..., :num_columns]
        rows_per_chunk = _rows_per_chunk(num_columns, dtype, chunk_bytes)

        compute = logit_blocks_for(logits.device, dtype)
        local = empty_statistics(local_targets.shape[0], logits, dtype)
        if num_columns > 0:
            for rows in chunks(local_targets.shape[0], rows_per_chunk):
                chunk_nv = _read(columns, positions, rows, logits.dtype if compute.reads_16_bits else dtype)
                compute.add_to_statistics(local[rows], chunk_nv, local_targets[rows])

        largest, total, target_logits = over_all_ranks(local, group)
        trained = slice(num_trained)
        ctx.save_for_backward(
            logits, local_targets[trained], largest[trained], total[trained], *(index[trained] for index in positions)
        )
        ctx.num_columns, ctx.rows_per_chunk = num_columns, rows_per_chunk
        logps = logits.new_zeros(logits.shape[:-1], dtype=dtype)
        logps[positions] = (target_logits - largest) - total.log()
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, local_targets, largest, total, *positions = ctx.saved_tensors
        tokens = Tokens(local_targets, largest, total, grad[tuple(positions)])
        logits_grad = torch.zeros_like(logits)
        compute = logit_blocks_for(logits.device, total.dtype)
        if ctx.num_columns > 0:
            columns, columns_grad = logits[..., : ctx.num_columns], logits_grad[..., : ctx.num_columns]
            for rows in chunks(local_targets.shape[0], ctx.rows_per_chunk):
                chunk_nv = _read(columns, positions, rows, logits.dtype if compute.reads_16_bits else total.dtype)
                compute.gradient(chunk_nv, tokens.of(rows), out_nc=chunk_nv)
                columns_grad[tuple(index[rows] for index in positions)] = chunk_nv.to(logits.dtype)
        return logits_grad, *[None] * 6


def _rows_per_chunk(num_columns: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (max(1, num_columns) * dtype.itemsize))


def _read(columns: Tensor, positions: tuple[Tensor, ...] | list[Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """Copy the logits of some positions to a contiguous ``[n, v]``, which the caller may overwrite."""
    return columns[tuple(index[rows] for index in positions)].to(dtype).contiguous()
