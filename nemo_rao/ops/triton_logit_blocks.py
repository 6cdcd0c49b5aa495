"""The operations of :mod:`nemo_rao.ops.logit_blocks` as Triton kernels, which read each block of logits once.

Imported only on first use, because Triton comes with PyTorch's CUDA builds. Matrix products remain cuBLAS's.

Both kernels are memory-bound: they compute one exponential per logit of 4 bytes, a fraction of what the special
function units do in that time. The configurations are therefore fixed, without autotuning:

- statistics: one program per row. 8 warps hold 4096 logits, 16 per thread, so four 16-byte loads are in flight; a block
  of ``linear_log_probs`` has thousands of rows, which fill the device.
- gradient: one program for each 2048 columns of a row, 8 warps, 8 logits per thread.

Rows should begin at multiples of 16 elements, as in :class:`nemo_rao.ops.blocks.Blocks`: Triton then loads 16
bytes at a time. Row offsets are 64-bit, as ``n c`` may exceed 2^31. The kernels neither synchronize with the host nor
allocate memory, so they can be captured in a CUDA graph after their first call. Results are deterministic: every sum
has a fixed order.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_rao.ops.logit_blocks import LogitBlocks, Tokens

STATISTICS_COLUMNS, GRADIENT_COLUMNS, NUM_WARPS = 4096, 2048, 8


@triton.jit
def _statistics_kernel(
    statistics,  # [n, 3] float32, contiguous
    logits,
    row_stride,
    targets,  # [n] int64
    first_column,
    num_columns,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    statistics += row * 3
    largest = tl.load(statistics)
    total = tl.load(statistics + 1)
    target_logit = tl.load(statistics + 2)
    for start in range(0, num_columns, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        values = tl.load(logits + columns, mask=columns < num_columns, other=-float("inf")).to(tl.float32)
        # Finite initial values, so that no infinities are subtracted.
        larger = tl.maximum(largest, tl.max(values, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger), 0)
        largest = larger
    column = tl.load(targets + row) - first_column
    is_here = (column >= 0) & (column < num_columns)
    target_logit += tl.load(logits + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(statistics, largest)
    tl.store(statistics + 1, total)
    tl.store(statistics + 2, target_logit)


@triton.jit
def _gradient_kernel(
    out,
    out_stride,
    logits,
    row_stride,
    targets,  # [n] int64
    first_column,
    num_columns,
    largest,  # [n] float32, as the next two
    largest_stride,
    total,
    total_stride,
    upstream,
    upstream_stride,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    m = tl.load(largest + row * largest_stride)
    s = tl.load(total + row * total_stride)
    g = tl.load(upstream + row * upstream_stride)
    target = tl.load(targets + row) - first_column
    values = tl.load(logits + row * row_stride + columns, mask=is_column, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - m)
    values = tl.where(columns == target, values - s, values) * (-g / s)
    tl.store(out + row * out_stride + columns, values.to(out.dtype.element_ty), mask=is_column)


def _add_to_statistics(statistics_n3: Tensor, logits_nc: Tensor, targets_n: Tensor, *, first_column: int = 0) -> None:
    num_rows, num_columns = logits_nc.shape
    if num_rows == 0 or num_columns == 0:
        return
    assert statistics_n3.dtype == torch.float32 and statistics_n3.is_contiguous() and targets_n.is_contiguous()
    assert logits_nc.stride(1) == 1 or num_columns == 1, logits_nc.stride()
    with _on_device_of(logits_nc):
        _statistics_kernel[(num_rows,)](
            statistics_n3,
            logits_nc,
            logits_nc.stride(0),
            targets_n,
            first_column,
            num_columns,
            COLUMNS=STATISTICS_COLUMNS,
            num_warps=NUM_WARPS,
        )


def _gradient(logits_nc: Tensor, tokens: Tokens, *, out_nc: Tensor, first_column: int = 0) -> None:
    num_rows, num_columns = logits_nc.shape
    if num_rows == 0 or num_columns == 0:
        return
    targets, largest, total, upstream = tokens
    assert largest.dtype == total.dtype == upstream.dtype == torch.float32 and targets.is_contiguous()
    assert num_columns == 1 or (logits_nc.stride(1) == out_nc.stride(1) == 1), (logits_nc.stride(), out_nc.stride())
    with _on_device_of(logits_nc):
        _gradient_kernel[(num_rows, triton.cdiv(num_columns, GRADIENT_COLUMNS))](
            out_nc,
            out_nc.stride(0),
            logits_nc,
            logits_nc.stride(0),
            targets,
            first_column,
            num_columns,
            largest,
            largest.stride(0),
            total,
            total.stride(0),
            upstream,
            upstream.stride(0),
            COLUMNS=GRADIENT_COLUMNS,
            num_warps=NUM_WARPS,
        )


def _on_device_of(tensor: Tensor) -> Any:
    """Make a tensor's device the current one, on which Triton launches. Triton's interpreter uses CPU tensors."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


TRITON = LogitBlocks("triton", _add_to_statistics, _gradient, reads_16_bits=True)
