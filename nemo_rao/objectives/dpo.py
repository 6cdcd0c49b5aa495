"""DPO, Direct Preference Optimization (Rafailov et al. 2023, Eq. 7), and two answers to wrong labels.

    Delta   = rho(w) - rho(l),    rho(y) = logp(y) - logp_ref(y)
    dpo     = -ls(beta Delta),                                               dL/dDelta = -beta s(-beta Delta)
    cDPO    = -(1 - eps) ls(beta Delta) - eps ls(-beta Delta)                (Mitchell 2023, conservative DPO)
    robust  = [-(1 - eps) ls(beta Delta) + eps ls(-beta Delta)] / (1 - 2 eps)    (Chowdhury et al. 2024, Eq. 12)

s = logistic, ls = log s, w and l the chosen and rejected response, eps = ``label_smoothing``, the probability that
they are the wrong way round. cDPO is what eps > 0 gives; ``robust: true`` gives the third, an unbiased estimate of the
loss on clean labels.
``sft_weight`` adds its multiple of the chosen response's mean negative log-probability per token.

**Choice** One pair a prompt, whatever K: the best and the worst response. A prompt without a pair takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.errors import UserError
from nemo_rao.keys import check, key
from nemo_rao.objectives.base import Objective
from nemo_rao.objectives.metrics import implicit_reward_metrics, pair_metrics
from nemo_rao.objectives.pairs import select_pairs
from nemo_rao.objectives.reductions import log_ratio, sum_over_prompts


@dataclass(frozen=True)
class DPOConfig:
    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    label_smoothing: float = key(0.0, "probability that a pair is the wrong way round, below 0.5", low=0, high=0.5)
    robust: bool = key(False, "with label_smoothing: the robust loss instead of cDPO's")
    sft_weight: float = key(0.0, "weight of the chosen response's negative log-probability per token", low=0)

    def __post_init__(self) -> None:
        check(self, "model.dpo")
        if self.label_smoothing == 0.5:
            raise UserError("model.dpo.label_smoothing=0.5: must be < 0.5; labels at random carry no preference")


def dpo_loss(batch: ObjectiveBatch, config: DPOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses; ``num_prompts`` counts those that have a pair."""
    pairs = select_pairs(batch)
    log_ratios = log_ratio(batch.response_logps, batch.reference_response_logps, batch.valid)
    logits = config.beta * (pairs.of_chosen(log_ratios) - pairs.of_rejected(log_ratios))
    right, wrong = -logsigmoid(logits), -logsigmoid(-logits)
    epsilon = config.label_smoothing
    if config.robust:
        losses = ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon)
    else:
        losses = (1 - epsilon) * right + epsilon * wrong
    if config.sft_weight > 0:
        nll = -pairs.of_chosen(batch.response_logps) / pairs.of_chosen(batch.lengths).clamp(min=1)
        losses = losses + config.sft_weight * nll
    loss_sum, num_pairs = sum_over_prompts(losses, pairs.valid)
    metrics = implicit_reward_metrics(config.beta * log_ratios, pairs) | pair_metrics(batch, pairs)
    return LossOutput(loss_sum, num_pairs, metrics)


DPO = Objective(
    name="dpo",
    config_type=DPOConfig,
    loss=dpo_loss,
    needs_reference=True,
    needs_preference=True,
    min_responses=2,
)
