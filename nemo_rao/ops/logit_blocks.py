"""Softmax statistics of a block of logits, for the forward pass, and the logits' gradient, for the backward pass.

Shape legend: ``n`` tokens and ``c`` vocabulary columns of one block. Per token, with z its logits, y its target, M the
largest logit of all ranks and g the upstream gradient:

    S = sum_j exp(z_j - M),    dz_j = g ([j = y] - exp(z_j - M) / S)

There are two implementations. :data:`PYTORCH` is the reference and runs on every device; each of its calls reads the
block about five times. The Triton kernels (:mod:`nemo_rao.ops.triton_logit_blocks`) read it once, and are used for CUDA
tensors if Triton can be imported. ``NEMO_RAO_TRITON=0`` turns them off.

M and S are kept apart: their log-sum-exp as one float32 would lose the digits of S if M is large.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SWITCH = "NEMO_RAO_TRITON"
"""Environment variable; ``0`` turns the Triton kernels off."""


class Tokens(NamedTuple):
    """Inputs of the gradient of tokens' logits, besides the logits.

    Attributes:
        targets: ``[n]`` int64, counted like ``first_column``; any value for a token of another rank.
        largest, total, upstream: ``[n]`` M, S and g, with the statistics' dtype; may be strided.
    """

    targets: Tensor
    largest: Tensor
    total: Tensor
    upstream: Tensor

    def of(self, rows: slice) -> Tokens:
        """Select some tokens."""
        return Tokens(*(values[rows] for values in self))


class AddToStatistics(Protocol):
    """Add further columns to softmax statistics, in place."""

    def __call__(self, statistics_n3: Tensor, logits_nc: Tensor, targets_n: Tensor, *, first_column: int = 0) -> None:
        """
        Args:
            statistics_n3: float32 or float64; see :func:`nemo_rao.ops.vocabulary.empty_statistics`. Contiguous.
            logits_nc: columns are adjacent in memory, rows may be further apart. May be overwritten.
            targets_n: see :class:`Tokens`.
            first_column: number of the block's first column.
        """


class Gradient(Protocol):
    """Compute the logits' gradient."""

    def __call__(self, logits_nc: Tensor, tokens: Tokens, *, out_nc: Tensor, first_column: int = 0) -> None:
        """
        Args:
            logits_nc, first_column: see :class:`AddToStatistics`.
            out_nc: output of the gradient, rounded once to its dtype. May be the logits' memory.
        """


class LogitBlocks(NamedTuple):
    """An implementation of the operations.

    Attributes:
        reads_16_bits: logits may be 16-bit numbers; otherwise they have the statistics' dtype.
    """

    name: str
    add_to_statistics: AddToStatistics
    gradient: Gradient
    reads_16_bits: bool


def logit_blocks_for(device: torch.device, dtype: torch.dtype) -> LogitBlocks:
    """Return the fastest implementation for statistics of type ``dtype`` on ``device``."""
    if device.type == "cuda" and dtype == torch.float32 and os.environ.get(SWITCH) != "0":
        return _triton() or PYTORCH
    return PYTORCH


@functools.cache
def _triton() -> LogitBlocks | None:
    try:
        from nemo_rao.ops.triton_logit_blocks import TRITON
    except ImportError:  # Triton comes with PyTorch's CUDA builds on Linux only
        return None
    return TRITON


def _target_columns(targets_n: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return ``([n], [n])``: each target's column among ``num_columns``, or 0, and whether it is one of them."""
    is_here = (targets_n >= 0) & (targets_n < num_columns)
    return torch.where(is_here, targets_n, 0), is_here


def _add_to_statistics(statistics_n3: Tensor, logits_nc: Tensor, targets_n: Tensor, *, first_column: int = 0) -> None:
    largest = torch.maximum(statistics_n3[:, 0], logits_nc.amax(-1))
    column, is_here = _target_columns(targets_n - first_column, logits_nc.shape[1])
    statistics_n3[:, 2] += torch.where(is_here, logits_nc.gather(1, column[:, None])[:, 0], 0)
    statistics_n3[:, 1] *= (statistics_n3[:, 0] - largest).exp_()
    statistics_n3[:, 1] += logits_nc.sub_(largest[:, None]).exp_().sum(-1)
    statistics_n3[:, 0] = largest


def _gradient(logits_nc: Tensor, tokens: Tokens, *, out_nc: Tensor, first_column: int = 0) -> None:
    targets, largest, total, upstream = tokens
    # exp(z - M) - S [j = y], which the scale makes g ([j = y] - exp(z - M) / S).
    logits_nc.sub_(largest[:, None]).exp_()
    column, is_here = _target_columns(targets - first_column, logits_nc.shape[1])
    logits_nc.scatter_add_(1, column[:, None], torch.where(is_here, -total, 0)[:, None])
    torch.mul(logits_nc, (-upstream / total)[:, None], out=out_nc)


PYTORCH = LogitBlocks("pytorch", _add_to_statistics, _gradient, reads_16_bits=False)
