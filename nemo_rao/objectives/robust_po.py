"""Robust preference optimization: distillation of one or several reward models (Fisch et al. 2024).

    L = min over models m of (r_m(w) - r_m(l) - beta Delta)^2  - gamma mean logp(w),    Delta = rho(w) - rho(l)

With one reward model this is plain distillation. With several (``data.reward_field=[a, b, ...]``), each pair uses the
one closest to the policy. **Choice** The minimum is taken per pair, not per batch, so that it does not depend on how a
batch is split. The last term is the paper's optional forward KL to the data, per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.pair_loss import PairConfig, terms
from nemo_rao.objectives.pairs import all_pairs
from nemo_rao.objectives.reductions import metric, sum_of_prompt_means


@dataclass(frozen=True)
class RobustPOConfig(PairConfig):
    block = "robust_po"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    gamma: float = key(0.0, "weight of the chosen response's negative log-probability per token (forward KL)", low=0)


def robust_po_loss(batch: ObjectiveBatch, config: RobustPOConfig) -> LossOutput:
    """Loss and metrics. ``robust_po/target_error``: mean absolute error over pairs, then prompts."""
    pairs, responses = all_pairs(batch), terms(batch)
    chosen, rejected = responses.through(pairs.of_chosen), responses.through(pairs.of_rejected)
    implicit = config.beta * (chosen.rho - rejected.rho)
    ensemble = batch.rewards[:, :, None] if batch.reward_ensemble is None else batch.reward_ensemble
    explicit = torch.stack([pairs.of_chosen(model) - pairs.of_rejected(model) for model in ensemble.unbind(-1)])
    squared_errors = (explicit - implicit).square().amin(0)
    weight = config.gamma + config.sft_weight
    losses = squared_errors - weight * chosen.mean_logp if weight > 0 else squared_errors
    loss_sum, num_prompts = sum_of_prompt_means(losses, pairs.valid)
    metrics = {
        "robust_po/target_error": metric(sum_of_prompt_means(squared_errors.detach().sqrt(), pairs.valid)),
        **shared_metrics(batch, config.beta * responses.rho),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


ROBUST_PO = Objective(
    name="robust_po",
    config_type=RobustPOConfig,
    loss=robust_po_loss,
    needs=Needs(reference=True, rewards=True, preference=True, pairs=True, min_responses=2),
    formula="min_m (r_m(w) − r_m(l) − βΔ)² − γ·logπ(w)/|w|",
    source="Fisch et al. 2024 (robust preference optimization through reward model distillation)",
    checked="rpo `sq` with η = 1; formula, gradient by hand, finite differences",
)
