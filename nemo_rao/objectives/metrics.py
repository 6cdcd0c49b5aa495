"""Metrics shared by objectives, each a ``[2]`` tensor (sum, count) without gradient.

They are means over prompts that have a pair (:mod:`nemo_rao.objectives.pairs`; for K > 2 the best and the worst
response, independently of the loss). Prompts with one response, or with none better than another, are not counted:

    rewards/chosen, rewards/rejected    implicit reward: beta * rho(y) = beta * (logp(y) - logp_ref(y)), beta included;
                                        without a reference, the term that the loss compares in its place
    rewards/margins                     chosen - rejected
    rewards/accuracies                  1 where the margin is > 0, else 0
    rewards/log_loss, rewards/brier     for the pair's probability p = sigmoid(margin) in the Bradley-Terry model:
                                        -log p, nats, and (1 - p)^2; log 2 and 0.25 for an uninformative reward
    logps/chosen, logps/rejected        log pi(y | x), summed over tokens, nats
    data/reward_chosen, _rejected       explicit reward, of those pairs that have one
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.pairs import BestAndWorst, best_and_worst
from nemo_rao.objectives.reductions import metric, sum_over_prompts


def shared_metrics(batch: ObjectiveBatch, implicit_rewards: Tensor) -> dict[str, Tensor]:
    """Compute all shared metrics.

    Args:
        implicit_rewards: ``[P, K]``, beta included; invalid entries are arbitrary.
    """
    pairs = best_and_worst(batch)
    return implicit_reward_metrics(implicit_rewards, pairs) | pair_metrics(batch, pairs)


def implicit_reward_metrics(implicit_rewards: Tensor, pairs: BestAndWorst) -> dict[str, Tensor]:
    """Compute ``rewards/*``."""
    implicit_rewards = implicit_rewards.detach()
    chosen, rejected = pairs.of_chosen(implicit_rewards), pairs.of_rejected(implicit_rewards)
    margins = chosen - rejected
    return {
        "rewards/chosen": metric(sum_over_prompts(chosen, pairs.valid)),
        "rewards/rejected": metric(sum_over_prompts(rejected, pairs.valid)),
        "rewards/margins": metric(sum_over_prompts(margins, pairs.valid)),
        "rewards/accuracies": metric(sum_over_prompts((chosen > rejected).to(chosen.dtype), pairs.valid)),
        "rewards/log_loss": metric(sum_over_prompts(-logsigmoid(margins), pairs.valid)),
        "rewards/brier": metric(sum_over_prompts(torch.sigmoid(-margins).square(), pairs.valid)),
    }


def pair_metrics(batch: ObjectiveBatch, pairs: BestAndWorst) -> dict[str, Tensor]:
    """Compute ``logps/*`` and ``data/*``, which need no reference."""
    metrics = {}
    for name, of in (("chosen", pairs.of_chosen), ("rejected", pairs.of_rejected)):
        metrics[f"logps/{name}"] = metric(sum_over_prompts(of(batch.response_logps), pairs.valid))
        rewards = of(batch.rewards)
        known = pairs.valid & ~rewards.isnan()
        metrics[f"data/reward_{name}"] = metric(sum_over_prompts(torch.where(known, rewards, 0), known))
    return metrics
