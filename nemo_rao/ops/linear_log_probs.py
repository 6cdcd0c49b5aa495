"""Log-probabilities of given tokens from hidden states and the output weight, without materializing logits.

Shape legend: ``T`` positions, ``N`` of them that are computed, ``n`` tokens and ``c`` vocabulary columns of one block;
``H`` hidden size, ``r`` low rank, ``F = H + r`` features; ``v`` vocabulary columns of this rank, without padding.

Per token, with x its features, W the weight, z = W x the logits, y the target, M the largest logit of all ranks and
g the upstream gradient:

    log p(y) = (z_y - M) - log S,    S = sum_j exp(z_j - M)
    dz_j     = g ([j = y] - exp(z_j - M) / S),    dx = W^T dz,    dW = sum over tokens of dz x^T

Blocks. Both passes iterate over slabs of c columns and chunks of n tokens, so that only ``[n, c]`` logits are held;
:meth:`nemo_rao.ops.blocks.Blocks.pairs` determines the order. Forward updates M and S as it goes (when M grows, S is
scaled down). Backward recomputes the logits, one product more than with saved ones. n and c follow from a budget in
bytes (:func:`nemo_rao.ops.workspace.block_sizes`), independently of T and V. In addition, a token takes a few dozen
bytes, and 4 F for its dx in backward. :mod:`nemo_rao.ops.logit_blocks` processes a block of logits between the
products: on a GPU, with Triton kernels that read it once.

Precision. Logits, statistics, dx and dW are float32 (float64 where hidden is) and summed over blocks without
intermediate rounding to 16 bits; :mod:`nemo_rao.ops.blocks` describes what 16-bit products read.

Communication over the tensor-parallel ranks: one all-gather of ``[N, 3]`` in forward; in backward one all-reduce of dx
``[N, F]``, only for the requested tokens, in float32, so that it is rounded once and not on each rank. With sequence
parallelism hidden is all-gathered in both passes (only the rank's part is saved, as in Megatron), and dx is
reduce-scattered.

Alternatives considered: Megatron's fused cross entropy, which still needs the logits; Liger's fused linear cross
entropy, which computes gradients in forward, before the loss's gradient for each token is known; Apple's cut
cross-entropy, whose products are Triton's instead of cuBLAS's. Neither of the last two adds to Megatron's
``main_grad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rao.ops.blocks import Blocks, add_product
from nemo_rao.ops.logit_blocks import Tokens, logit_blocks_for
from nemo_rao.ops.vocabulary import (
    Columns,
    Positions,
    columns_of_rank,
    empty_statistics,
    over_all_ranks,
    selected,
)
from nemo_rao.ops.workspace import CPU_WORKSPACE_BYTES, CUDA_WORKSPACE_BYTES


def linear_vocab_parallel_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
    positions: Positions | None = None,
    num_trained: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    sequence_parallel: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Compute log p(target) at every position, in nats, under softmax(hidden @ weight.T).

    A collective of ``group`` in forward and, if hidden or u needs a gradient, in backward: all of its ranks must call
    it with the same targets and mask. Backward expects the same upstream gradient on all of them, which holds if each
    computes the same loss. Gradients of hidden and u are complete (summed over the ranks), those of weight and b belong
    to the rank's rows. Without ``positions``, the host waits once for a GPU, to list them and to check the targets.

    If the weight has a ``main_grad`` (Megatron's distributed data parallel), its gradient is added there, and autograd
    gets a placeholder, by the protocol of Megatron's linear layers: ``grad_added_to_main_grad``, ``zero_out_wgrad``.

    Args:
        hidden: ``[..., H]`` of any float dtype and memory layout, the same on every rank. Never modified.
        weight: ``[V/TP, H]`` of hidden's dtype; rank i of ``group`` holds rows ``[i * V/TP, (i + 1) * V/TP)``.
        targets: ``[...]`` integers in [0, vocab_size), the same on every rank.
        vocab_size: V without padding. Rows from there on are excluded from the softmax and get zero gradient.
        group: the tensor-parallel ranks; ``None`` for one.
        mask: ``[...]`` bool. Where false, nothing is computed: the result and the gradients are zero, for any hidden
            state and target.
        positions: instead of a mask, the N positions to compute, if the caller knows them: the host does not wait for a
            GPU, and targets are not checked.
        num_trained: the first ``num_trained`` of ``positions`` carry a gradient, the others are constants without
            backward computation; ``None`` for all.
        low_rank: u ``[..., r]``, b ``[V/TP, r]``, which add ``u @ b.T`` to the logits: LoRA on the output layer, with
            its scale inside u. As in adapters, u has all positions, also with ``sequence_parallel``.
        sequence_parallel: hidden is ``[T/TP, ...]``, the rank's part of dimension 0; everything else is ``[T, ...]``.
        workspace_bytes: maximum memory of the blocks; ``None`` for 24 MiB on a CPU, where they should stay in the
            caches, and 512 MiB on a GPU, where products should be large.

    Returns:
        ``[...]`` float32, or float64 for float64 hidden states; the same on every rank of ``group``.
    """
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)
    assert weight.ndim == 2 and hidden.shape[-1] == weight.shape[1], (hidden.shape, weight.shape)
    columns = columns_of_rank(weight.shape[0], vocab_size, group)
    gathered = sequence_parallel and columns.group is not None
    num_parts = dist.get_world_size(columns.group) if gathered else 1
    assert targets.ndim > 0 and targets.shape[0] == num_parts * hidden.shape[0], (hidden.shape, targets.shape)
    assert hidden.shape[1:-1] == targets.shape[1:], (hidden.shape, targets.shape)
    u, b = (None, None) if low_rank is None else low_rank
    if u is not None and b is not None:
        assert u.shape == (*targets.shape, b.shape[1]) and b.shape[0] == weight.shape[0], (u.shape, b.shape)
    if workspace_bytes is None:
        workspace_bytes = CUDA_WORKSPACE_BYTES if hidden.is_cuda else CPU_WORKSPACE_BYTES
    positions, chosen = selected(targets, mask, positions, vocab_size)
    assert num_trained is None or 0 <= num_trained <= len(chosen), (num_trained, len(chosen))
    local_targets = chosen - columns.first
    return _LinearLogProbs.apply(
        hidden, weight, u, b, local_targets, positions, num_trained, targets.shape, columns, gathered, workspace_bytes
    )


class _LinearLogProbs(torch.autograd.Function):
    """:func:`linear_vocab_parallel_log_probs` at listed positions, zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        u: Tensor | None,
        b: Tensor | None,
        local_targets: Tensor,
        positions: Positions,
        num_trained: int | None,
        shape: torch.Size,
        columns: Columns,
        gathered: bool,
        workspace_bytes: int,
    ) -> Tensor:
        """``local_targets`` ``[N]`` count from this rank's first column; ``positions`` index them in ``shape``."""
        whole = _all_gather(hidden, columns.group) if gathered else hidden
        blocks = Blocks(whole, weight, u, b, positions, columns.num, workspace_bytes)
        compute = logit_blocks_for(hidden.device, blocks.dtype)
        local_n3 = empty_statistics(len(local_targets), hidden, blocks.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for slab, rows in blocks.pairs():
                logits_nc = blocks.logits(blocks.features_of(rows), blocks.weight_of(slab))
                compute.add_to_statistics(local_n3[rows], logits_nc, local_targets[rows], first_column=slab.start)
        largest, total, target_logits = over_all_ranks(local_n3, columns.group)

        of_tokens = (local_targets, largest, total, *positions)
        ctx.save_for_backward(hidden, weight, u, b, *(values[:num_trained] for values in of_tokens))
        ctx.columns, ctx.gathered, ctx.workspace_bytes = columns, gathered, workspace_bytes
        ctx.parameter = weight  # a saved tensor may come back as a copy, without Megatron's attributes
        logps = hidden.new_zeros(shape, dtype=blocks.dtype)
        logps[positions] = (target_logits - largest) - total.log()
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, u, b, local_targets, largest, total, *positions = ctx.saved_tensors
        positions, group, size = tuple(positions), ctx.columns.group, hidden.shape[-1]
        needs_hidden, needs_weight, needs_u, needs_b = ctx.needs_input_grad[:4]
        whole = _all_gather(hidden, group) if ctx.gathered else hidden

        # The first H features are hidden's, the others u's.
        wanted = slice(0 if needs_hidden else size, size + (u.shape[-1] if needs_u else 0))
        features_grad = hidden.new_zeros(len(local_targets), wanted.stop - wanted.start, dtype=total.dtype)
        # For each weight: where its gradient is summed, and the features that it multiplies.
        sums = [(_sum_of(ctx.parameter), slice(0, size))] if needs_weight else []
        if needs_b:
            sums.append((torch.zeros_like(b), slice(size, None)))
        with torch.autocast(hidden.device.type, enabled=False):
            _add_gradients(
                features_grad,
                sums,
                Blocks(whole, weight, u, b, positions, ctx.columns.num, ctx.workspace_bytes),
                Tokens(local_targets, largest, total, grad[positions]),
                wanted=wanted,
            )

        hidden_part, u_part = features_grad.tensor_split([size - wanted.start], dim=1)
        hidden_grad = u_grad = None
        if group is not None and (needs_u or (needs_hidden and not ctx.gathered)):
            # All at once; if hidden is gathered, only u's part.
            u_part = u_part.contiguous() if ctx.gathered else u_part
            dist.all_reduce(u_part if ctx.gathered else features_grad, group=group)
        if needs_hidden:
            if ctx.gathered:
                whole_grad = _put(hidden_part, positions, torch.zeros_like(whole, dtype=total.dtype))
                hidden_grad = _reduce_scatter(whole_grad, group).to(hidden.dtype)
            else:
                hidden_grad = _put(hidden_part, positions, torch.zeros_like(hidden))
        if needs_u:
            u_grad = _put(u_part, positions, torch.zeros_like(u))
        weight_grad = _for_autograd(ctx.parameter, sums[0][0]) if needs_weight else None
        return hidden_grad, weight_grad, u_grad, sums[-1][0] if needs_b else None, *[None] * 7


def _add_gradients(
    features_grad: Tensor,
    sums: Sequence[tuple[Tensor, slice]],
    blocks: Blocks,
    tokens: Tokens,
    *,
    wanted: slice,
) -> None:
    """Accumulate the gradients of all N tokens, in place.

    Args:
        features_grad: gradient of the ``wanted`` features, ``[N, wanted]``.
        sums: gradients of weights ``[V/TP, part of F]``, and the features that each of them multiplies.
    """
    compute = logit_blocks_for(features_grad.device, tokens.total.dtype)
    slab_sums = [blocks.sum_of_slabs(weight_sum) for weight_sum, _ in sums]
    for slab, rows in blocks.pairs(sums=slab_sums):
        features_nf, weight_cf = blocks.features_of(rows), blocks.weight_of(slab)
        logits_nc = blocks.logits(features_nf, weight_cf)
        grad_nc = blocks.factor_like(logits_nc)
        compute.gradient(logits_nc, tokens.of(rows), out_nc=grad_nc, first_column=slab.start)
        if features_grad.shape[1] > 0:
            add_product(features_grad[rows], grad_nc, weight_cf[:, wanted])
        for slab_sum, (_, features) in zip(slab_sums, sums, strict=True):
            add_product(slab_sum.of(slab), grad_nc.T, features_nf[:, features])
    for slab_sum in slab_sums:
        slab_sum.finish()


def _put(part: Tensor, positions: Positions, into: Tensor) -> Tensor:
    """Write ``part`` ``[N, F]`` to its positions of ``into`` ``[..., F]``, in the latter's dtype."""
    into[positions] = part.to(into.dtype)
    return into


# ------------------------------------------------------------------------------------- Megatron's main_grad


def _sum_of(weight: Tensor) -> Tensor:
    """Return the accumulator of the weight's gradient: Megatron's sum over micro-batches, or zeros."""
    main_grad = getattr(weight, "main_grad", None)
    return torch.zeros_like(weight) if main_grad is None else main_grad


def _for_autograd(weight: Any, weight_sum: Tensor) -> Tensor | None:
    """Return the weight's gradient for autograd: :func:`_sum_of`, or a placeholder if that is in ``main_grad``.

    As in Megatron's linear layers. Its data-parallel hook requires ``weight.grad`` to exist, and adds it to
    ``main_grad`` if ``grad_added_to_main_grad`` is unset, or if ``zero_out_wgrad`` states that the embedding shares the
    weight: then autograd has added the embedding's gradient to the returned tensor, which must be zeros.
    """
    if weight_sum is not getattr(weight, "main_grad", None):
        return weight_sum
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


# --------------------------------------------------------------------------------------- sequence parallelism


def _all_gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather ``[T/TP, ...]`` of every rank to ``[T, ...]``."""
    whole = part.new_empty(dist.get_world_size(group) * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _reduce_scatter(whole: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum ``[T, ...]`` over ranks and return this rank's ``[T/TP, ...]``."""
    part = whole.new_empty(whole.shape[0] // dist.get_world_size(group), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole, group=group)
    return part
