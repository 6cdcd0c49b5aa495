"""From token log-probabilities to one number per prompt and response, arranged by prompt.

    [B, T] --sums_at--> [R] --to_prompts--> [P, K]

All functions are differentiable; what a mask leaves out gets exactly zero gradient, whatever value stands there.
Shape legend: see :mod:`nemo_rao.batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sums_at(logps: Tensor, places: Tensor) -> Tensor:
    """Sums of log-probabilities over listed places: of each prompt without t0, or of each response.

    Args:
        logps: ``[B, T]``, nats; anything, NaN included, at places that are not listed.
        places: ``[S, longest]`` int64, b * T + t; -1 for none. No place stands in two rows, and the order in which a
            row is added up, and its gradient, are the same on every device and for every layout of the batch.

    Returns:
        ``[S]``.
    """
    return values_at(logps, places).sum(-1)


def values_at(logps: Tensor, places: Tensor) -> Tensor:
    """``[S, longest]`` log-probabilities at listed places; 0 with zero gradient where there is none.

    Arguments as of :func:`sums_at`.
    """
    # Not a product with a mask: 0 * NaN is NaN, in the value and in the gradient.
    return torch.where(places >= 0, logps.flatten()[places.clamp(min=0)], 0)


def to_prompts(
    values: Tensor, prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int
) -> Tensor:
    """Rows arranged by prompt and response.

    Args:
        values: ``[R]``, or ``[R, ...]``.
        prompt_index, response_index: ``[R]`` int64, where each row goes; no two rows to one place.

    Returns:
        ``[P, K]``, or ``[P, K, ...]``; zero where no row goes, see :func:`valid_entries`.
    """
    empty = values.new_zeros(num_prompts, num_responses, *values.shape[1:])
    return empty.index_put((prompt_index, response_index), values)


def valid_entries(prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int) -> Tensor:
    """``[P, K]`` bool: the places to which :func:`to_prompts` brings a row."""
    rows = torch.ones_like(prompt_index, dtype=torch.bool)
    return to_prompts(rows, prompt_index, response_index, num_prompts, num_responses)
