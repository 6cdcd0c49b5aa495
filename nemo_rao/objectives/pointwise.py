"""Pointwise losses, on single responses: dro (with a value head) and kto."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch, RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import MeanTarget, Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.reductions import metric, response_log_ratio, rewarded, sum_of_prompt_means

# --------------------------------------------------------------------------------------------------------------- dro


@dataclass(frozen=True)
class DROConfig(ObjectiveConfig):
    block = "dro"

    tau: float = key(1.0, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    value_lr: float | None = key(
        None, "maximum learning rate of the value head; null: the model's", low=0, exclusive=True
    )


def dro_loss(batch: ObjectiveBatch, config: DROConfig) -> LossOutput:
    """DRO-V: 1/tau 1/2 (r - sg V - tau rho)^2 of the policy, plus 1/2 (V - r + tau sg rho)^2 of the value.

    dL/dlogp(y) = -(r - V - tau rho), dL/dV = V - r + tau rho. In addition to the shared metrics, means over responses:

        dro/target_error    \\|r - V - tau rho\\|
        dro/value           V(x)
    """
    assert batch.values is not None, "dro was given no values"
    valid, log_ratio = rewarded(batch), response_log_ratio(batch)
    rewards = torch.where(valid, batch.rewards, 0)
    values = torch.where(valid, batch.values, 0)
    error = rewards - values.detach() - config.tau * log_ratio
    value_error = values - rewards + config.tau * log_ratio.detach()
    loss_sum, num_prompts = sum_of_prompt_means(0.5 / config.tau * error.square() + 0.5 * value_error.square(), valid)
    metrics = {
        "dro/target_error": metric(sum_of_prompt_means(error.detach().abs(), valid)),
        "dro/value": metric(sum_of_prompt_means(values.detach(), valid)),
        **shared_metrics(batch, config.tau * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


def mean_target_of_dro(config: DROConfig, rewards: RewardSummary) -> MeanTarget | None:
    """mean(r) / tau, since V(x) is near 0 at the start and has not learned the mean reward."""
    if rewards.mean is None:
        return None
    remedy = f"nemo-rao score --shift={rewards.mean:.4g}, which subtracts the mean reward that V(x) must still learn,"
    return MeanTarget(rewards.mean / config.tau, remedy)


DRO = Objective(
    name="dro",
    config_type=DROConfig,
    loss=dro_loss,
    needs=Needs(reference=True, rewards=True, values="prompt"),
    formula="(1/τ)·½(r − sg V − τρ)² + ½(V − r + τ·sg ρ)²",
    source="Richemond et al. 2024 (DRO-V)",
    checked="formula, gradients by hand (of the value too), finite differences",
    mean_target=mean_target_of_dro,
)


# --------------------------------------------------------------------------------------------------------------- kto


@dataclass(frozen=True)
class KTOConfig(ObjectiveConfig):
    block = "kto"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    desirable_weight: float = key(1.0, "lambda_D, weight of desirable responses", low=0)
    undesirable_weight: float = key(1.0, "lambda_U, weight of undesirable responses", low=0)
    threshold: float | None = key(None, "responses with a reward above it are desirable; null: use the data's labels")


def desirable(batch: ObjectiveBatch, config: KTOConfig) -> Tensor:
    """``[P, K]`` bool, whether a response is desirable: by the threshold; else the first response of a ranked prompt,
    or a label of 1."""
    rewards = torch.where(rewarded(batch), batch.rewards, 0)
    if config.threshold is not None:
        return rewards > config.threshold
    first = torch.arange(batch.valid.shape[1], device=batch.valid.device) == batch.valid.int().argmax(-1, keepdim=True)
    return torch.where(batch.ranked[:, None], first, rewards > 0.5)


def kto_loss(batch: ObjectiveBatch, config: KTOConfig) -> LossOutput:
    """lambda_D (1 - s(beta (rho - z0))) of desirable, lambda_U (1 - s(beta (z0 - rho))) of undesirable responses.

    z0 = max(0, mean rho of mismatched prompts and responses), over the *global* batch and without gradient: the same
    number for every micro-batch and rank. s = logistic. In addition to the shared metrics:

        kto/z0                                     nats
        kto/reward_desirable, _undesirable         beta rho, means over prompts
    """
    assert batch.kl_estimate is not None, "kto was given no estimate of the KL divergence"
    takes_part = batch.valid if config.threshold is None else rewarded(batch)
    if config.threshold is None:
        takes_part = takes_part & (batch.ranked[:, None] | rewarded(batch))
    good, log_ratio = desirable(batch, config), response_log_ratio(batch)
    z0 = batch.kl_estimate.detach().clamp(min=0)
    towards = torch.where(good, log_ratio - z0, z0 - log_ratio)
    weights = config.desirable_weight * good.to(z0.dtype) + config.undesirable_weight * (~good).to(z0.dtype)
    losses = weights * torch.sigmoid(-config.beta * towards)
    loss_sum, num_prompts = sum_of_prompt_means(losses, takes_part)
    rewards = config.beta * log_ratio.detach()
    metrics = {
        "kto/z0": metric((z0 * num_prompts, num_prompts)),
        "kto/reward_desirable": metric(sum_of_prompt_means(rewards, takes_part & good)),
        "kto/reward_undesirable": metric(sum_of_prompt_means(rewards, takes_part & ~good)),
        **shared_metrics(batch, rewards),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


def require_labels(config: KTOConfig, rewards: RewardSummary) -> KTOConfig:
    """Reject rewards that are not labels if no threshold is set."""
    if config.threshold is None and not (rewards.all_labels or rewards.all_ranked):
        raise UserError(
            "model.kto.threshold is null, but the data's rewards are not labels (1 or 0) and its responses "
            "are not all pairs of chosen and rejected. Set it to the reward above which a response is desirable"
            + ("." if rewards.mean is None else f" (the mean reward is {rewards.mean:.4g}).")
        )
    return config


def kto_needs(config: KTOConfig) -> Needs:
    """Requirements: rewards with a threshold, else labels."""
    return Needs(
        reference=True, kl_estimate=True, preference=config.threshold is None, rewards=config.threshold is not None
    )


KTO = Objective(
    name="kto",
    config_type=KTOConfig,
    loss=kto_loss,
    needs=kto_needs,
    formula="desirable: λ_D(1 − σ(β(ρ − z₀))); undesirable: λ_U(1 − σ(β(z₀ − ρ))); z₀ = max(0, mean ρ(y'|x), y' of "
    "another prompt)",
    source="Ethayarajh et al. 2024 (KTO)",
    checked="TRL's KTO; formula, gradient by hand, finite differences",
    resolve=require_labels,
)
