"""Sums over a micro-batch's prompts, and log-ratios, safe against what stands in invalid entries.

Invalid entries are replaced before anything is computed from them: a mask applied afterwards would leave NaN in the
gradient, since 0 * NaN is NaN. Shape legend: see :mod:`nemo_rao.batch`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_ratio(logps: Tensor, reference_logps: Tensor | None, valid: Tensor) -> Tensor:
    """rho = log pi_theta - log pi_ref, ``[P, K]``, nats; 0 with zero gradient where not ``valid``."""
    assert reference_logps is not None, "an objective that declares needs_reference was given none"
    return torch.where(valid, logps, 0) - torch.where(valid, reference_logps.detach(), 0)


def sum_of_prompt_means(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over prompts of the mean over valid responses, and the number of prompts that have one.

    Args:
        values: ``[P, K]``, finite where not ``valid``.
        valid: ``[P, K]`` bool.

    Returns:
        ``([], [])``, of the type of ``values``. The first divided by the second, each added up over all micro-batches
        and ranks, is the mean over prompts.
    """
    num_valid = valid.sum(-1)
    means = torch.where(valid, values, 0).sum(-1) / num_valid.clamp(min=1)
    return means.sum(), (num_valid > 0).sum().to(values.dtype)


def sum_over_prompts(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over valid prompts and their number, for values ``[P]``; see :func:`sum_of_prompt_means`."""
    return torch.where(valid, values, 0).sum(), valid.sum().to(values.dtype)


def metric(sum_and_count: tuple[Tensor, Tensor]) -> Tensor:
    """``[2]`` (sum, count) without gradient, the form in which metrics are reported."""
    return torch.stack(sum_and_count).detach()
