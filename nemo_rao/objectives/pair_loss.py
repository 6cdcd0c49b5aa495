"""Common parts of pairwise losses: the compared terms, the mean over a prompt's pairs, SFT weight and metrics.

A pairwise loss is a function of the two sides of a pair. It needs no mask: entries without a pair are zero, where
every such function is finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, ObjectiveConfig
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.pairs import all_pairs
from nemo_rao.objectives.reductions import per_token, response_log_ratio, sum_of_prompt_means

WITH_REFERENCE = Needs(reference=True, preference=True, pairs=True, min_responses=2)
WITHOUT_REFERENCE = Needs(preference=True, pairs=True, min_responses=2)


@dataclass(frozen=True)
class PairConfig(ObjectiveConfig):
    """Keys shared by all pairwise losses."""

    sft_weight: float = key(0.0, "weight of the chosen response's negative log-probability per token", low=0)


@dataclass(frozen=True)
class Terms:
    """Quantities of responses, ``[P, K]``, or of one side of every pair, ``[P, K, K]``; nats.

    Attributes:
        logp, mean_logp: log pi(y|x), summed over the response's tokens, and their mean.
        rho, mean_rho: log-ratio to the reference policy, summed and mean; zeros without a reference.
        length: |y|, tokens.
        reward: explicit reward; NaN if unknown.
    """

    logp: Tensor
    mean_logp: Tensor
    rho: Tensor
    mean_rho: Tensor
    length: Tensor
    reward: Tensor

    def through(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """Apply ``change`` to every term."""
        return Terms(**{field.name: change(getattr(self, field.name)) for field in dataclasses.fields(self)})


def terms(batch: ObjectiveBatch) -> Terms:
    """Terms of every response of a batch."""
    if batch.reference_response_logps is None:
        rho = batch.response_logps.new_zeros(batch.response_logps.shape)
    else:
        rho = response_log_ratio(batch)
    return Terms(
        logp=batch.response_logps,
        mean_logp=per_token(batch.response_logps, batch),
        rho=rho,
        mean_rho=per_token(rho, batch),
        length=batch.lengths,
        reward=batch.rewards,
    )


def loss_of_pairs(
    pair_loss: Callable[[Terms, Terms, Any], Tensor], implicit_reward: Callable[[Terms, Any], Tensor]
) -> Callable[[ObjectiveBatch, Any], LossOutput]:
    """Build an objective's loss from the loss of one pair.

    Args:
        pair_loss: (chosen, rejected, config) -> ``[P, K, K]``; must be finite, with finite gradient, at all-zero terms.
        implicit_reward: (responses, config) -> ``[P, K]``, for the metrics ``rewards/*``.
    """

    def loss(batch: ObjectiveBatch, config: Any) -> LossOutput:
        pairs, responses = all_pairs(batch), terms(batch)
        chosen, rejected = responses.through(pairs.of_chosen), responses.through(pairs.of_rejected)
        losses = pair_loss(chosen, rejected, config)
        if config.sft_weight > 0:
            losses = losses - config.sft_weight * chosen.mean_logp
        loss_sum, num_prompts = sum_of_prompt_means(losses, pairs.valid)
        return LossOutput(loss_sum, num_prompts, shared_metrics(batch, implicit_reward(responses, config)))

    return loss


def beta_rho(responses: Terms, config: Any) -> Tensor:
    """The implicit reward of objectives with a reference: beta * rho(y)."""
    return config.beta * responses.rho
