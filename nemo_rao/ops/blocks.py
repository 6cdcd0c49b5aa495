"""A product of features and a weight that is too large to hold, a block of tokens and columns at a time.

Shape legend: ``N`` tokens that are computed, ``n`` tokens and ``c`` vocabulary columns of one block; ``H`` hidden size,
``r`` low rank, ``F = H + r`` features; ``v`` vocabulary columns of this rank, padding left out.

The memory of one block is set aside once and used for all of them: memory that is given back and asked for again costs
page faults on a CPU, and two blocks of logits at a time.

Types. Results are float32 (float64 where hidden is), summed over blocks without being rounded to 16 bits in between.
What a product of 16-bit tensors reads follows from what the device has:

- CUDA: tensor cores, 16-bit factors into float32 results. The logits' gradient is rounded to 16 bits once, as a
  factor.
- CPU: PyTorch has no product of 16-bit factors with a float32 result there; 16-bit results, rounded before they are
  added up, would lose what summing in float32 is for. Factors are widened block by block instead, and the logits'
  gradient is not rounded at all. Without AMX or AVX512-BF16 this is the fast way, too: on AVX512 alone, float32
  products ran three to four times as fast as bfloat16 ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_rao.ops.vocabulary import Positions, chunks
from nemo_rao.ops.workspace import block_sizes


class Blocks:
    """What is read of the features ``[N, F]`` and of the weight ``[v, F]``, a block at a time, in memory set aside.

    Attributes:
        dtype: of logits, statistics and sums.
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
        )
        num_rows, width = self.sizes
        self.logits_memory = hidden.new_empty(num_rows * width, dtype=self.dtype)
        self.scaled_memory = self.logits_memory
        if self.read_dtype != self.dtype:
            self.scaled_memory = hidden.new_empty(num_rows * width, dtype=self.read_dtype)
        self.features_memory = hidden.new_empty(num_rows, self.num_features, dtype=self.read_dtype)
        self.reads_in_place = b is None and weight.dtype == self.read_dtype
        self.weight_memory = hidden.new_empty(
            0 if self.reads_in_place else width, self.num_features, dtype=self.read_dtype
        )

    def slabs(self) -> Iterator[slice]:
        """Of columns; none if there is no token to compute."""
        return chunks(self.num_columns if self.num_tokens > 0 else 0, self.sizes[1])

    def chunks(self) -> Iterator[slice]:
        """Of tokens."""
        return chunks(self.num_tokens, self.sizes[0])

    def weight_of(self, slab: slice) -> Tensor:
        """``[c, F]``, until the next call."""
        if self.reads_in_place:
            return self.weights[0][slab]
        return _side_by_side([part[slab] for part in self.weights], self.weight_memory)

    def like_a_slab(self, weight_sum: Tensor) -> Tensor | None:
        """Memory ``[c, ...]`` to add up a slab of a ``[V/TP, ...]`` sum in; ``None`` where none is needed."""
        if weight_sum.dtype == self.dtype:
            return None
        return weight_sum.new_empty(self.sizes[1], *weight_sum.shape[1:], dtype=self.dtype)

    def features_of(self, rows: slice) -> Tensor:
        """``[n, F]``, until the next call."""
        here = tuple(index[rows] for index in self.positions)
        return _side_by_side([part[here] for part in self.features], self.features_memory)

    def logits(self, features_nf: Tensor, weight_cf: Tensor) -> Tensor:
        """``[n, c]``, until the next call; the caller may overwrite it."""
        num_rows, width = len(features_nf), len(weight_cf)
        logits_nc = self.logits_memory[: num_rows * width].view(num_rows, width)
        if features_nf.dtype == self.dtype:
            return torch.mm(features_nf, weight_cf.T, out=logits_nc)
        return torch.mm(features_nf, weight_cf.T, out_dtype=self.dtype, out=logits_nc)

    def scaled(self, rows_nc: Tensor, scale_n: Tensor) -> Tensor:
        """``[n, c]`` ``scale * rows`` as a factor of the products to come, until the next call."""
        out = self.scaled_memory[: rows_nc.numel()].view_as(rows_nc)
        return torch.mul(rows_nc, scale_n[:, None], out=out)


def read_dtype_of(hidden: Tensor) -> torch.dtype:
    """The type in which products read their factors (this module's docstring)."""
    if hidden.dtype == torch.float64:
        return torch.float64
    # From PyTorch 2.8 on. Before, factors are widened on a GPU, too: slower, as exact.
    if hidden.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads():
        return hidden.dtype
    return torch.float32


def _side_by_side(parts: list[Tensor], memory: Tensor) -> Tensor:
    """``[n, F]`` in ``memory``, whose type it has."""
    out, start = memory[: len(parts[0])], 0
    for part in parts:
        out[:, start : start + part.shape[1]].copy_(part)
        start += part.shape[1]
    return out


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, in the total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)
