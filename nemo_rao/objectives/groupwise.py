"""Groupwise losses, over all responses of a prompt: rpo_partition, kimi, agro, qrpo, nca.

rho(y) = logp(y) - logp_ref(y), r the explicit reward, K the number of the prompt's responses. Rewards, reference
log-probabilities and quantities derived from them carry no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import shared_metrics
from nemo_rao.objectives.pairs import rewards_known
from nemo_rao.objectives.reductions import (
    mean_of_responses,
    metric,
    per_token,
    response_log_ratio,
    rewarded,
    sum_of_prompt_means,
    sum_over_prompts,
)


def known_rewards(batch: ObjectiveBatch) -> Tensor:
    """``[P, K]`` rewards, with 0 for unknown and invalid entries."""
    return torch.where(rewarded(batch), batch.rewards, 0)


# ----------------------------------------------------------------------------------------------------- rpo_partition


@dataclass(frozen=True)
class RPOPartitionConfig(ObjectiveConfig):
    block = "rpo_partition"

    tau: float = key(5.0, "reward per nat of log-ratio per token", low=0, exclusive=True)


def rpo_partition_loss(batch: ObjectiveBatch, config: RPOPartitionConfig) -> LossOutput:
    """1/2 (mean rho - (r - V) / tau)^2, with V = tau logsumexp_k(mean logp_ref(y_k) + r_k / tau) over the prompt.

    Log-probabilities are means over tokens. ``rpo_partition/target_error``: mean of \\|tau mean rho - (r - V)\\|.
    """
    assert batch.reference_response_logps is not None
    valid, rewards = rewarded(batch), known_rewards(batch)
    reference = per_token(batch.reference_response_logps.detach(), batch)
    exponents = torch.where(valid, reference + rewards / config.tau, -torch.inf)
    # A prompt without responses has no partition function; 0 avoids NaN, and the prompt is not counted.
    exponents = torch.where(valid.any(-1, keepdim=True), exponents, 0)
    log_partition = exponents.logsumexp(-1, keepdim=True)
    log_ratio = per_token(response_log_ratio(batch), batch)
    error = log_ratio - (rewards / config.tau - log_partition)
    loss_sum, num_prompts = sum_of_prompt_means(0.5 * error.square(), valid)
    metrics = {
        "rpo_partition/target_error": metric(sum_of_prompt_means(config.tau * error.detach().abs(), valid)),
        **shared_metrics(batch, config.tau * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


RPO_PARTITION = Objective(
    name="rpo_partition",
    config_type=RPOPartitionConfig,
    loss=rpo_partition_loss,
    needs=Needs(reference=True, rewards=True),
    formula="½(ρ̄ − (r − V̂)/τ)², V̂ = τ·logsumexp_k(logπ_ref(y_k)/|y_k| + r_k/τ), ρ̄ = ρ/|y|",
    source="Faye et al. 2025",
    checked="formula, gradient by hand, finite differences",
)


# -------------------------------------------------------------------------------------------------------------- kimi


@dataclass(frozen=True)
class KimiConfig(ObjectiveConfig):
    block = "kimi"

    tau: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)


def kimi_loss(batch: ObjectiveBatch, config: KimiConfig) -> LossOutput:
    """(r - mean r - tau rho)^2, the mean over the prompt's responses. ``kimi/target_error``: mean of its root.

    Prompts with a single response are left out, since their mean reward carries no information.
    """
    rewards, log_ratio = known_rewards(batch), response_log_ratio(batch)
    valid = rewarded(batch) & (rewarded(batch).sum(-1, keepdim=True) >= 2)
    error = rewards - mean_of_responses(rewards, valid) - config.tau * log_ratio
    loss_sum, num_prompts = sum_of_prompt_means(error.square(), valid)
    metrics = {
        "kimi/target_error": metric(sum_of_prompt_means(error.detach().abs(), valid)),
        **shared_metrics(batch, config.tau * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


KIMI = Objective(
    name="kimi",
    config_type=KimiConfig,
    loss=kimi_loss,
    needs=Needs(reference=True, rewards=True, min_responses=2),
    formula="(r − r̄ − τρ)², r̄ the mean of the prompt's rewards",
    source="Kimi Team 2025 (k1.5)",
    checked="formula, gradient by hand, finite differences",
)


# -------------------------------------------------------------------------------------------------------------- agro


@dataclass(frozen=True)
class AGROConfig(ObjectiveConfig):
    block = "agro"

    beta: float = key(0.1, "reward per nat of log-ratio to the reference", low=0, exclusive=True)


def agro_loss(batch: ObjectiveBatch, config: AGROConfig) -> LossOutput:
    """1/2 Var_k(r - beta rho), which is 0 if r - beta rho is the same for all of a prompt's responses.

    **Choice** The unbiased variance, divided by K - 1, so that prompts with different K estimate the same quantity.
    ``agro/deviation``: mean over prompts of the standard deviation.
    """
    valid, log_ratio = rewarded(batch), response_log_ratio(batch)
    residual = known_rewards(batch) - config.beta * log_ratio
    deviations = torch.where(valid, residual - mean_of_responses(residual, valid), 0)
    variance = deviations.square().sum(-1) / (valid.sum(-1) - 1).clamp(min=1)
    several = valid.sum(-1) >= 2
    loss_sum, num_prompts = sum_over_prompts(0.5 * variance, several)
    metrics = {
        "agro/deviation": metric(sum_over_prompts(variance.detach().sqrt(), several)),
        **shared_metrics(batch, config.beta * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


AGRO = Objective(
    name="agro",
    config_type=AGROConfig,
    loss=agro_loss,
    needs=Needs(reference=True, rewards=True, min_responses=2),
    formula="½·Var_k(r − βρ), unbiased",
    source="Tang et al. 2025 (AGRO, any-generation reward optimization)",
    checked="formula, gradient by hand, finite differences",
)


# -------------------------------------------------------------------------------------------------------------- qrpo


@dataclass(frozen=True)
class QRPOConfig(ObjectiveConfig):
    block = "qrpo"

    beta: float = key(0.1, "quantile of the reward per nat of log-ratio to the reference", low=0, exclusive=True)
    exact_log_z: bool = key(False, "log Z = log(beta (e^(1/beta) - 1)) instead of its limit log beta + 1/beta")


def reward_quantiles(batch: ObjectiveBatch) -> Tensor:
    """``[P, K]``, fraction of the prompt's reference rewards that are at most the response's reward.

    The reference rewards are those of the row (``reference_rewards``), or if it has none, the rewards of the prompt's
    own responses.
    """
    rewards = known_rewards(batch)
    own = torch.where(rewarded(batch), batch.rewards, torch.nan)
    samples, given = own, batch.reference_rewards
    if given is not None:
        width = max(own.shape[1], given.shape[1])
        own, given = (_pad_with_nan(values, width) for values in (own, given))
        samples = torch.where(given.isnan().all(-1, keepdim=True), own, given)
    known = ~samples.isnan()
    not_above = (samples[:, None, :] <= rewards[:, :, None]) & known[:, None, :]
    return not_above.sum(-1).to(rewards.dtype) / known.sum(-1, keepdim=True).clamp(min=1)


def _pad_with_nan(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=torch.nan)


def log_partition(config: QRPOConfig) -> float:
    """log Z, nats: quantile rewards are uniform under the reference, so log Z = log of the integral of e^(q / beta)."""
    limit = math.log(config.beta) + 1 / config.beta
    return limit + math.log1p(-math.exp(-1 / config.beta)) if config.exact_log_z else limit


def qrpo_loss(batch: ObjectiveBatch, config: QRPOConfig) -> LossOutput:
    """(q - beta log Z - beta rho)^2 with q the reward's quantile. ``qrpo/target_error``: mean of its root."""
    valid, log_ratio = rewarded(batch), response_log_ratio(batch)
    error = reward_quantiles(batch) - config.beta * (log_partition(config) + log_ratio)
    loss_sum, num_prompts = sum_of_prompt_means(error.square(), valid)
    metrics = {
        "qrpo/target_error": metric(sum_of_prompt_means(error.detach().abs(), valid)),
        **shared_metrics(batch, config.beta * log_ratio),
    }
    return LossOutput(loss_sum, num_prompts, metrics)


QRPO = Objective(
    name="qrpo",
    config_type=QRPOConfig,
    loss=qrpo_loss,
    needs=Needs(reference=True, rewards=True),
    formula="(r̃ − β·log Z − βρ)², r̃ the quantile of r among reference rewards, log Z = log β + 1/β",
    source="Matrenok et al. 2025 (QRPO)",
    checked="formula, gradient by hand, finite differences",
)


# --------------------------------------------------------------------------------------------------------------- nca


@dataclass(frozen=True)
class NCAConfig(ObjectiveConfig):
    block = "nca"

    beta: float = key(0.01, "reward per nat of log-ratio to the reference", low=0, exclusive=True)
    alpha: float = key(0.01, "temperature of the softmax over a prompt's rewards", low=0, exclusive=True)


def nca_loss(batch: ObjectiveBatch, config: NCAConfig) -> LossOutput:
    """-sum_k softmax(r / alpha)_k ls(beta rho_k) - 1/K sum_k ls(-beta rho_k).

    **Choice** A prompt with labels but without rewards is treated as the limit alpha -> 0: the chosen response gets all
    the weight. A prompt with neither is left out.
    """
    log_ratio = response_log_ratio(batch)
    by_reward = rewards_known(batch)[:, None]
    first = torch.arange(batch.valid.shape[1], device=batch.valid.device) == batch.valid.int().argmax(-1, keepdim=True)
    logits = torch.where(batch.valid & by_reward, batch.rewards / config.alpha, 0)
    weights = torch.where(batch.valid, logits, -1e30).softmax(-1)
    weights = torch.where(by_reward, weights, first.to(weights.dtype))
    scaled = config.beta * log_ratio
    raised = torch.where(batch.valid, weights * -logsigmoid(scaled), 0).sum(-1)
    kept_low = mean_of_responses(-logsigmoid(-scaled), batch.valid)[:, 0]
    takes_part = batch.valid.any(-1) & (by_reward[:, 0] | batch.ranked)
    loss_sum, num_prompts = sum_over_prompts(raised + kept_low, takes_part)
    return LossOutput(loss_sum, num_prompts, shared_metrics(batch, scaled))


NCA = Objective(
    name="nca",
    config_type=NCAConfig,
    loss=nca_loss,
    needs=Needs(reference=True, preference=True, min_responses=2),
    formula="−Σ_k softmax(r/α)_k·lσ(βρ_k) − (1/K)·Σ_k lσ(−βρ_k)",
    source="Chen et al. 2024 (NCA)",
    checked="TRL `nca_pair` (K = 2, labels); formula, gradient by hand, finite differences",
)
