"""RLOO, REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740, Eq. 7), on fresh samples.

    R_k = r_k - beta * rho(y_k)                      the reward minus the response's contribution to the KL
    A_k = R_k - mean of the other R of the prompt    = K / (K - 1) (R_k - mean R)
    L   = -A_k rho(y_k),                             dL / dlogp(y_k) = -A_k / K

R and A carry no gradient. Mean over a prompt's responses, then over prompts. With samples from the current policy, the
expected gradient is that of -E[r] + beta KL(pi || pi_ref).

At eta 1 the gradient of :mod:`rpo <nemo_rao.objectives.rpo>`'s ``sqloo`` on the same samples is beta K^2 / (K - 1)
times this one: its sum over responses is not divided by K.

**Choice** The paper has logp instead of the last rho. The two differ by a constant, and rho, which is smaller, has less
rounding error.
**Choice** rho is that of the current policy. On fresh samples this is the policy that sampled; if a rollout is used for
several steps (``online.mini_batches``, ``online.epochs``), no importance ratio corrects for staleness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.reductions import (
    mean_of_responses,
    metric,
    response_log_ratio,
    rewarded,
    sum_of_prompt_means,
)


@dataclass(frozen=True)
class RLOOConfig(ObjectiveConfig):
    block = "rloo"

    beta: float = key(0.03, "reward per nat of log-ratio to the reference", low=0)


def rloo_loss(batch: ObjectiveBatch, config: RLOOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses; prompts with a single response are left out.

    ``rloo/advantage``: mean over a prompt's responses of \\|A\\|, then over prompts.
    """
    log_ratio, valid, advantages = response_log_ratio(batch), _compared(batch), rloo_advantages(batch, config)
    loss_sum, num_prompts = sum_of_prompt_means(-advantages * log_ratio, valid)
    metrics = {
        "rloo/advantage": metric(sum_of_prompt_means(advantages.abs(), valid)),
        **shared_metrics(batch, config.beta * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


def rloo_advantages(batch: ObjectiveBatch, config: RLOOConfig) -> Tensor:
    """A, ``[P, K]``, without gradient; 0 for responses that are left out."""
    valid = _compared(batch)
    counts = valid.sum(-1, keepdim=True).to(batch.response_logps.dtype)
    shaped = torch.where(valid, batch.rewards, 0) - config.beta * response_log_ratio(batch).detach()
    deviations = torch.where(valid, shaped - mean_of_responses(shaped, valid), 0)
    return deviations * (counts / (counts - 1).clamp(min=1))


def _compared(batch: ObjectiveBatch) -> Tensor:
    """``[P, K]`` bool, true for rewarded responses of prompts with at least two of them."""
    valid = rewarded(batch)
    return valid & (valid.sum(-1, keepdim=True) >= 2)


RLOO = Objective(
    name="rloo",
    config_type=RLOOConfig,
    loss=rloo_loss,
    needs=Needs(reference=True, rewards=True, min_responses=2, samples=True),
    formula="−sg(A)·ρ, A = R − mean of the prompt's other R, R = r − βρ",
    source="Ahmadian et al. 2024 (RLOO), arXiv 2402.14740, Eq. 7",
    checked="formula, gradient by hand; TRL; `rpo`'s `sqloo` up to a constant",
    response_advantages=rloo_advantages,
)
