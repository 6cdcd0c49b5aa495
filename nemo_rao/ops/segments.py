"""From token log-probabilities to one number per prompt and response, arranged by prompt.

    [R, T] --sequence_sums--> [R], [R] --to_prompts--> [P, K]

All functions are differentiable; what a mask leaves out gets exactly zero gradient, whatever value stands there.
Shape legend: see :mod:`nemo_rao.batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_sums(logps: Tensor, prompt_mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of log-probabilities over each row's prompt, without t0, and over its response.

    Args:
        logps: ``[R, T]``, nats; anything, NaN included, where both masks are false.
        prompt_mask, response_mask: ``[R, T]`` bool, of :class:`nemo_rao.batch.MicroBatch`.

    Returns:
        ``([R], [R])``: prompt sums, response sums.
    """
    # Not a product with the mask: 0 * NaN is NaN, in the sum and in the gradient.
    return torch.where(prompt_mask, logps, 0).sum(-1), torch.where(response_mask, logps, 0).sum(-1)


def to_prompts(
    values: Tensor, prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int
) -> Tensor:
    """Rows arranged by prompt and response.

    Args:
        values: ``[R]``, or ``[R, M]``.
        prompt_index, response_index: ``[R]`` int64, where each row goes; no two rows to one place.

    Returns:
        ``[P, K]``, or ``[P, K, M]``; zero where no row goes, see :func:`valid_entries`.
    """
    empty = values.new_zeros(num_prompts, num_responses, *values.shape[1:])
    return empty.index_put((prompt_index, response_index), values)


def valid_entries(prompt_index: Tensor, response_index: Tensor, num_prompts: int, num_responses: int) -> Tensor:
    """``[P, K]`` bool: the places to which :func:`to_prompts` brings a row."""
    rows = torch.ones_like(prompt_index, dtype=torch.bool)
    return to_prompts(rows, prompt_index, response_index, num_prompts, num_responses)
