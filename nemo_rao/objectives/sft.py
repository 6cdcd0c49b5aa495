"""SFT, supervised fine-tuning on each prompt's best response.

    L = -logp(y) / |y| - w logp(x) / |x|,    dL / dlogp(y) = -1 / |y|,    dL / dlogp(x) = -w / |x|

y is the chosen response of a labeled pair, else the response with the highest reward if all rewards are known, else
the first. **Choice** Mean over a response's tokens, then over prompts: long and short responses have the same weight.
w = ``prompt_weight`` is 0 by default, so that the prompt is not learned.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import pair_metrics
from nemo_rao.objectives.pairs import best_and_worst, select_best, take
from nemo_rao.objectives.reductions import sum_over_prompts


@dataclass(frozen=True)
class SFTConfig(ObjectiveConfig):
    block = "sft"

    prompt_weight: float = key(0.0, "weight of the prompt's mean negative log-likelihood, as in pretraining", low=0)


def sft_loss(batch: ObjectiveBatch, config: SFTConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses; metrics also cover the rejected ones of pairs."""
    index, valid = select_best(batch)
    losses = -take(batch.response_logps, index, valid) / take(batch.lengths, index, valid).clamp(min=1)
    if config.prompt_weight:
        prompt_logps = take(batch.prompt_logps, index, valid)
        losses = losses - config.prompt_weight * prompt_logps / take(batch.prompt_lengths, index, valid).clamp(min=1)
    loss_sum, num_prompts = sum_over_prompts(losses, valid)
    return LossOutput(loss_sum, num_prompts, pair_metrics(batch, best_and_worst(batch)))


def needs_of_sft(config: SFTConfig) -> Needs:
    """Requirements; prompts are only needed if they have a weight."""
    return Needs(prompt_logps=config.prompt_weight > 0, prompt_gradient=config.prompt_weight > 0)


SFT = Objective(
    name="sft",
    config_type=SFTConfig,
    loss=sft_loss,
    needs=needs_of_sft,
    formula="−logπ(y)/|y| of the best (or only) response",
    source="maximum likelihood, averaged over tokens",
    checked="TRL's `sft`; formula, finite differences",
)
