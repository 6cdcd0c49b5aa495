"""Sums over a micro-batch's prompts, and log-ratios, safe for arbitrary values in invalid entries.

Invalid entries are replaced before anything is computed from them: masking afterwards would leave NaN in the gradient,
since 0 * NaN is NaN. Shape legend: see :mod:`nemo_rao.batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch


def log_ratio(logps: Tensor, reference_logps: Tensor | None, valid: Tensor) -> Tensor:
    """rho = log pi_theta - log pi_ref, ``[P, K]``, nats; 0 with zero gradient where not ``valid``."""
    assert reference_logps is not None, "the objective needs reference log-probs, but there are none"
    return torch.where(valid, logps, 0) - torch.where(valid, reference_logps.detach(), 0)


def response_log_ratio(batch: ObjectiveBatch) -> Tensor:
    """rho(y), ``[P, K]``; see :func:`log_ratio`."""
    return log_ratio(batch.response_logps, batch.reference_response_logps, batch.valid)


def per_token(sums: Tensor, batch: ObjectiveBatch) -> Tensor:
    """Sums over a response's tokens -> means, ``[P, K]``; 0 with zero gradient where not valid."""
    return torch.where(batch.valid, sums, 0) / torch.where(batch.valid, batch.lengths, 1)


def rewarded(batch: ObjectiveBatch) -> Tensor:
    """``[P, K]`` bool, true for valid responses with an explicit reward."""
    return batch.valid & ~batch.rewards.isnan()


def sum_of_prompt_means(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over prompts of the mean over a prompt's valid entries, and the number of prompts with valid entries.

    Args:
        values: ``[P, ...]``, one entry per response ``[P, K]`` or pair ``[P, K, K]``; finite even where not ``valid``.
        valid: bool, same shape.

    Returns:
        ``([], [])``, with the dtype of ``values``. The first divided by the second, each summed over all micro-batches
        and ranks, is the mean over prompts.
    """
    values, valid = values.flatten(1), valid.flatten(1)
    num_valid = valid.sum(-1)
    means = torch.where(valid, values, 0).sum(-1) / num_valid.clamp(min=1)
    return means.sum(), (num_valid > 0).sum().to(values.dtype)


def sum_over_prompts(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over valid prompts and their number, for values ``[P]``; see :func:`sum_of_prompt_means`."""
    return torch.where(valid, values, 0).sum(), valid.sum().to(values.dtype)


def mean_of_responses(values: Tensor, valid: Tensor) -> Tensor:
    """``[P, K]`` -> ``[P, 1]``, mean over valid responses; 0 if there are none."""
    return torch.where(valid, values, 0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)


def metric(sum_and_count: tuple[Tensor, Tensor]) -> Tensor:
    """Stack a metric to ``[2]`` (sum, count), without gradient."""
    return torch.stack(sum_and_count).detach()
