"""GRPO, group relative policy optimization (Shao et al. 2024, arXiv 2402.03300), token by token, on fresh samples.

    A_k   = r_k - mean of the prompt's rewards, divided by their standard deviation unless ``scale: none``
    w_t   = pi(y_t) / pi_old(y_t), where pi_old is the policy that sampled
    L_t   = -min(w_t A, clip(w_t, 1 - clip_low, 1 + clip_high) A) + beta KL_t
    KL_t  = k1: log pi - log pi_ref;  k2: 1/2 (log pi - log pi_ref)^2;  k3: pi_ref / pi - 1 - log(pi_ref / pi)

``kl_in: reward`` subtracts beta times the sum of KL_t, without gradient, from each response's reward instead of adding
KL_t to the loss. ``normalize`` determines how L_t is averaged, always by counts of the *global* batch:

    sequence    mean over a response's tokens, then over responses         GRPO, Eq. 3
    token       mean over all tokens                                       DAPO, Yu et al. 2025, arXiv 2503.14476, Eq. 8
    constant    sum over a response's tokens / ``constant_length``, then   Dr. GRPO, Liu et al. 2025, arXiv 2503.20783
                mean over responses

DAPO is ``token`` with ``clip_high`` 0.28; Dr. GRPO is ``constant`` with ``scale: none``.

With ``online.vllm_importance_cap``, the policy's part of L_t is multiplied by min(pi_old(y_t) / mu(y_t), cap), where mu
is the distribution that the sampler drew from.

**Choice** The standard deviation is that of the prompt's rewards, with divisor K - 1, plus 1e-6, as in TRL. A prompt
with one response, or with equal rewards, has advantages of 0 and is still counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch, Tokens
from nemo_rao.keys import key
from nemo_rao.objectives.base import Needs, Objective, ObjectiveConfig
from nemo_rao.objectives.metrics import pair_metrics
from nemo_rao.objectives.pairs import best_and_worst
from nemo_rao.objectives.reductions import mean_of_responses, metric, rewarded

_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class GRPOConfig(ObjectiveConfig):
    block = "grpo"

    beta: float = key(0.0, "weight of the KL to the reference; 0: no reference is needed", low=0)
    kl_in: str = key("loss", "whether the KL is part of the loss or the reward", choices=("loss", "reward"))
    kl: str = key("k3", "per-token estimator of the KL", choices=("k1", "k2", "k3"))
    scale: str = key("std", "divisor of a group's advantages", choices=("std", "none"))
    clip_low: float = key(0.2, "the ratio is clipped at 1 minus this", low=0, high=1)
    clip_high: float = key(0.2, "the ratio is clipped at 1 plus this; 0.28 in DAPO", low=0)
    normalize: str = key(
        "sequence", "unit over which the tokens' losses are averaged", choices=("sequence", "token", "constant")
    )
    constant_length: float = key(256.0, "tokens, with normalize=constant", low=0, exclusive=True)


def grpo_loss(batch: ObjectiveBatch, config: GRPOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses.

    Means over tokens:

        grpo/ratio       w
        grpo/clipped     1 where clipping has removed the token's gradient
        grpo/kl          KL_t to the reference by k3, with a reference

    ``grpo/advantage``: mean over responses of \\|A\\|.
    """
    assert batch.tokens is not None, "grpo was given no tokens"
    tokens, valid = batch.tokens, rewarded(batch)
    mask = tokens.mask & valid[..., None]
    logps = torch.where(mask, tokens.logps, 0)
    old = logps.detach() if tokens.old is None else torch.where(mask, tokens.old.detach(), 0)
    kl = _kl_of(tokens, mask, config)
    advantages = grpo_advantages(batch, config)[..., None]
    ratio = (logps - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if tokens.importance is not None:
        losses = torch.where(mask, tokens.importance.detach(), 0) * losses
    if kl is not None and config.kl_in == "loss":
        losses = losses + config.beta * kl
    loss_sum, count = _sum(torch.where(mask, losses, 0), mask, valid, config)

    num_tokens = mask.sum().to(loss_sum.dtype)

    def over_tokens(values: Tensor) -> Tensor:
        return metric((torch.where(mask, values.detach(), 0).sum(), num_tokens))

    metrics = {
        "grpo/ratio": over_tokens(ratio),
        "grpo/clipped": over_tokens((clipped * advantages < ratio * advantages).to(ratio.dtype)),
        "grpo/advantage": metric((torch.where(valid, advantages[..., 0].abs(), 0).sum(), valid.sum().to(ratio.dtype))),
        **pair_metrics(batch, best_and_worst(batch)),
    }
    if tokens.reference is not None:
        metrics["grpo/kl"] = over_tokens(_kl(logps, torch.where(mask, tokens.reference, 0), "k3"))
    return LossOutput(loss_sum, count, metrics)


def grpo_advantages(batch: ObjectiveBatch, config: GRPOConfig) -> Tensor:
    """A, ``[P, K]``, without gradient; 0 for responses without a reward."""
    assert batch.tokens is not None, "grpo was given no tokens"
    valid = rewarded(batch)
    mask = batch.tokens.mask & valid[..., None]
    rewards = torch.where(valid, batch.rewards, 0)
    kl = _kl_of(batch.tokens, mask, config)
    if kl is not None and config.kl_in == "reward":
        rewards = rewards - config.beta * torch.where(mask, kl.detach(), 0).sum(-1)
    deviations = torch.where(valid, rewards - mean_of_responses(rewards, valid), 0)
    if config.scale == "none":
        return deviations
    counts = valid.sum(-1, keepdim=True)
    variance = deviations.square().sum(-1, keepdim=True) / (counts - 1).clamp(min=1)
    return deviations / (variance.sqrt() + _LEAST_DEVIATION)


def _kl_of(tokens: Tokens, mask: Tensor, config: GRPOConfig) -> Tensor | None:
    if tokens.reference is None:
        return None
    return _kl(torch.where(mask, tokens.logps, 0), torch.where(mask, tokens.reference.detach(), 0), config.kl)


def _kl(logps: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """``[P, K, L]``, nats, per-token estimates; for k1 and k3 their mean over samples of pi is the KL."""
    log_ratio = logps - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def _sum(losses: Tensor, mask: Tensor, valid: Tensor, config: GRPOConfig) -> tuple[Tensor, Tensor]:
    """(sum of losses, divisor); the quotient of their sums over the global batch is the loss."""
    sums, lengths = losses.sum(-1), mask.sum(-1)
    num_responses = (valid & (lengths > 0)).sum().to(losses.dtype)
    if config.normalize == "token":
        return sums.sum(), lengths.sum().to(losses.dtype)
    if config.normalize == "constant":
        return sums.sum() / config.constant_length, num_responses
    return (sums / lengths.clamp(min=1)).sum(), num_responses


def needs_of_grpo(config: GRPOConfig) -> Needs:
    """Requirements; the reference is only needed with a KL."""
    return Needs(reference=config.beta > 0, rewards=True, min_responses=2, tokens=True, samples=True)


GRPO = Objective(
    name="grpo",
    config_type=GRPOConfig,
    loss=grpo_loss,
    needs=needs_of_grpo,
    formula="−min(w·A, clip(w, 1 − ε_low, 1 + ε_high)·A) + β·KL, per token; A = (r − r̄)/s",
    source="Shao et al. 2024 (GRPO), arXiv 2402.03300; DAPO, Dr. GRPO by keys",
    checked="formula, gradient by hand; TRL's GRPO",
    response_advantages=grpo_advantages,
)
