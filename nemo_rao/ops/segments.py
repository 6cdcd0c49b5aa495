"""Sum token log-probabilities per prompt and response, and arrange them by prompt.

    [B, T] --sums_at--> [R] --to_prompts--> [P, K]

All functions are differentiable; masked entries get exactly zero gradient, for any value.
Shape legend: see :mod:`nemo_rao.batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums_at(logps: Tensor, positions: Tensor) -> Tensor:
    """Sum log-probabilities over listed positions: of each prompt without t0, or of each response.

    Args:
        logps: ``[B, T]``, nats; any value, NaN included, at positions that are not listed.
        positions: ``[S, longest]`` int64, positions b * T + t; -1 for none. No position is in two rows. The order of
            summation over a row, and of its gradient, is the same on every device and for every layout of the batch.

    Returns:
        ``[S]``.
    """
    return values_at(logps, positions).sum(-1)


def values_at(logps: Tensor, positions: Tensor) -> Tensor:
    """Return ``[S, longest]`` log-probabilities at listed positions; 0 with zero gradient where there is none.

    For the arguments see :func:`sums_at`.
    """
    # Not a product with a mask: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(positions >= 0, logps.flatten()[positions.clamp(min=0)], 0)


def to_prompts(
    values: Tensor, prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int
) -> Tensor:
    """Arrange rows by prompt and response.

    Args:
        values: ``[R]``, or ``[R, ...]``.
        prompt_index, response_index: ``[R]`` int64, the target of each row; no two rows have the same one.

    Returns:
        ``[P, K]``, or ``[P, K, ...]``; zero where there is no row, see :func:`valid_entries`.
    """
    empty = values.new_zeros(num_prompts, num_responses, *values.shape[1:])
    return empty.index_put((prompt_index, response_index), values)


def valid_entries(prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int) -> Tensor:
    """Return ``[P, K]`` bool: the entries that :func:`to_prompts` fills with a row."""
    rows = torch.ones_like(prompt_index, dtype=torch.bool)
    return to_prompts(rows, prompt_index, response_index, num_prompts, num_responses)
