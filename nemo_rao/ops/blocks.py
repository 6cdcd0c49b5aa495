"""A product of features and a weight that is too large to hold, computed one block of tokens and columns at a time.

Shape legend: ``N`` tokens that are computed, ``n`` tokens and ``c`` vocabulary columns of one block; ``H`` hidden size,
``r`` low rank, ``F = H + r`` features; ``v`` vocabulary columns of this rank, without padding.

The memory of one block is allocated once and reused for all of them: memory that is freed and reallocated costs page
faults on a CPU, and two blocks of logits at a time.

Types. Results are float32 (float64 where hidden is), summed over blocks without intermediate rounding to 16 bits. What
a product of 16-bit tensors reads depends on the device:

- CUDA: tensor cores, 16-bit factors into float32 results. The logits' gradient is rounded to 16 bits once, as a
  factor. Blocks are whole tiles of the products, and their rows begin at aligned addresses, without which cuBLAS falls
  back to slower kernels.
- CPU: PyTorch has no product of 16-bit factors with a float32 result there; 16-bit results, rounded before they are
  summed, would lose the precision of float32 sums. Factors are widened block by block instead, and the logits' gradient
  is not rounded at all. Without AMX or AVX512-BF16 this is also the fast way: on AVX512 alone, float32 products ran
  three to four times as fast as bfloat16 ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nemo_rao.ops.vocabulary import Positions, chunks
from nemo_rao.ops.workspace import CUDA_TILE, block_sizes

_ALIGNED = 16  # elements: 32 bytes in 16-bit types


class Blocks:
    """Reads the features ``[N, F]`` and the weight ``[v, F]`` block by block, into preallocated memory.

    Attributes:
        dtype: dtype of logits, statistics and sums.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        u: Tensor | None,
        b: Tensor | None,
        positions: Positions,
        num_columns: int,
        workspace_bytes: int,
    ) -> None:
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.read_dtype = read_dtype_of(hidden)
        self.features = [hidden] if u is None else [hidden, u]
        self.weights = [weight] if b is None else [weight, b]
        self.num_features = sum(part.shape[1] for part in self.weights)
        self.positions, self.num_columns, self.num_tokens = positions, num_columns, len(positions[0])
        self.sizes = block_sizes(
            self.num_tokens,
            num_columns,
            self.num_features,
            workspace_bytes,
            self.dtype.itemsize,
            self.read_dtype.itemsize,
            multiple=tile_of(hidden),
        )
        num_rows, width = self.sizes
        self.alignment = min(_ALIGNED, tile_of(hidden))
        num_logits = num_rows * self._row_stride(width)
        self.logits_memory = hidden.new_empty(num_logits, dtype=self.dtype)
        self.factor_memory = self.logits_memory
        if self.read_dtype != self.dtype:
            self.factor_memory = hidden.new_empty(num_logits, dtype=self.read_dtype)
        self.features_memory = hidden.new_empty(num_rows, self.num_features, dtype=self.read_dtype)
        self.features_held: slice | None = None
        self.reads_in_place = b is None and weight.dtype == self.read_dtype
        self.slab_held: slice | None = None
        self.tokens_first = tile_of(hidden) > 1 and self.reads_in_place
        self.weight_memory = hidden.new_empty(
            0 if self.reads_in_place else width, self.num_features, dtype=self.read_dtype
        )

    def pairs(self, *, sums: Sequence[SlabSum] = ()) -> Iterator[tuple[slice, slice]]:
        """Yield slabs of columns with chunks of tokens, each pair once; none if there is no token to compute.

        The outer loop is over the vocabulary if a slab's copy or its part of ``sums`` is needed, which then serves all
        tokens. Otherwise, on a GPU, it is over chunks of tokens, whose features are then gathered once.
        """
        num_rows, width = self.sizes
        if self.tokens_first and not any(one.is_wide for one in sums):
            for rows in chunks(self.num_tokens, num_rows):
                yield from ((slab, rows) for slab in chunks(self.num_columns, width))
            return
        for slab in chunks(self.num_columns, width):
            yield from ((slab, rows) for rows in chunks(self.num_tokens, num_rows))

    def weight_of(self, slab: slice) -> Tensor:
        """Return ``[c, F]``, valid until the next call. The same slab is not read twice in a row."""
        if self.reads_in_place:
            return self.weights[0][slab]
        if slab != self.slab_held:
            _side_by_side([part[slab] for part in self.weights], self.weight_memory)
            self.slab_held = slab
        return self.weight_memory[: slab.stop - slab.start]

    def sum_of_slabs(self, weight_sum: Tensor) -> SlabSum:
        """Wrap ``weight_sum`` ``[V/TP, ...]`` for accumulation by slab."""
        is_wide = weight_sum.dtype != self.dtype
        shape = (self.sizes[1] if is_wide else 0, *weight_sum.shape[1:])
        return SlabSum(weight_sum, weight_sum.new_empty(shape, dtype=self.dtype), is_wide)

    def features_of(self, rows: slice) -> Tensor:
        """Return ``[n, F]``, valid until the next call. The same rows are not read twice in a row."""
        if rows != self.features_held:
            here = tuple(index[rows] for index in self.positions)
            _side_by_side([part[here] for part in self.features], self.features_memory)
            self.features_held = rows
        return self.features_memory[: rows.stop - rows.start]

    def logits(self, features_nf: Tensor, weight_cf: Tensor) -> Tensor:
        """Return ``[n, c]``, valid until the next call; the caller may overwrite it."""
        logits_nc = self._block(self.logits_memory, len(features_nf), len(weight_cf))
        if features_nf.dtype == self.dtype:
            return torch.mm(features_nf, weight_cf.T, out=logits_nc)
        return torch.mm(features_nf, weight_cf.T, out_dtype=self.dtype, out=logits_nc)

    def factor_like(self, logits_nc: Tensor) -> Tensor:
        """Return ``[n, c]`` memory for a factor of the next products, valid until the next call.

        It is the logits' memory if both have the same dtype.
        """
        return self._block(self.factor_memory, *logits_nc.shape)

    def _block(self, memory: Tensor, num_rows: int, width: int) -> Tensor:
        stride = self._row_stride(width)
        return memory[: num_rows * stride].view(num_rows, stride)[:, :width]

    def _row_stride(self, width: int) -> int:
        return -(-width // self.alignment) * self.alignment


class SlabSum:
    """A weight's gradient, accumulated in float32 (float64) for any dtype.

    Attributes:
        is_wide: a slab is accumulated in separate memory, and rounded once when the next one begins.
    """

    def __init__(self, weight_sum: Tensor, memory: Tensor, is_wide: bool) -> None:
        self.weight_sum, self.memory, self.is_wide = weight_sum, memory, is_wide
        self.held: slice | None = None

    def of(self, slab: slice) -> Tensor:
        """Return ``[c, ...]`` for in-place accumulation, valid until the next call."""
        if not self.is_wide:
            return self.weight_sum[slab]
        part = self.memory[: slab.stop - slab.start]
        if slab != self.held:
            self.finish()
            part.copy_(self.weight_sum[slab])
            self.held = slab
        return part

    def finish(self) -> None:
        """Round the last slab. Call it once, at the end."""
        if self.held is not None:
            self.weight_sum[self.held].copy_(self.memory[: self.held.stop - self.held.start])
            self.held = None


def read_dtype_of(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which products read their factors (see the module's docstring)."""
    if hidden.dtype == torch.float64:
        return torch.float64
    # Since PyTorch 2.8. Before, factors are also widened on a GPU: slower but equally exact.
    if hidden.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads():
        return hidden.dtype
    return torch.float32


def tile_of(hidden: Tensor) -> int:
    """Return the number of tokens and columns of which blocks are multiples (see the module's docstring)."""
    return CUDA_TILE if hidden.is_cuda else 1


def _side_by_side(parts: list[Tensor], memory: Tensor) -> Tensor:
    """Concatenate to ``[n, F]`` in ``memory``, with its dtype."""
    out, start = memory[: len(parts[0])], 0
    for part in parts:
        out[:, start : start + part.shape[1]].copy_(part)
        start += part.shape[1]
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right`` in the dtype of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_in_place(left.dtype, total.dtype, total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


@functools.cache
def _adds_in_place(factors: torch.dtype, total: torch.dtype, device: torch.device) -> bool:
    """Whether cuBLAS may add a product of 16-bit factors to a float32 sum, which saves three passes over the sum.

    PyTorch 2.8 has the operator, but rejects a sum with another dtype than the factors.
    """
    sums, ones = torch.zeros(16, 16, dtype=total, device=device), torch.ones(16, 16, dtype=factors, device=device)
    try:
        torch.addmm(sums, ones, ones, out_dtype=total, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True
