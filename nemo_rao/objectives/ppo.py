"""PPO, proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347), token by token, on fresh samples.

Before the first step on a rollout, from the policy that sampled (old), the reference and the values at that time:

    r_t   = -kl_coef (log pi_old(y_t) - log pi_ref(y_t)), at the last token + the response's reward
    d_t   = r_t + gamma V_old,t+1 - V_old,t,   V_old behind the last token = 0
    A_t   = sum over l >= 0 of (gamma gae_lambda)^l d_t+l                       (Schulman et al. 2016, arXiv 1506.02438)
    R_t   = A_t + V_old,t
    A_t  <- (A_t - mean A) / sqrt(var A + 1e-8), over all tokens of the rollout

V_t = V(x, y_<t) is read where y_t is predicted. In each step:

    w_t   = pi(y_t) / pi_old(y_t)
    L_t   = -min(w_t A_t, clip(w_t, 1 - clip, 1 + clip) A_t)
            + value_weight 1/2 max((V_t - R_t)^2, (clip(V_t, V_old,t - value_clip, V_old,t + value_clip) - R_t)^2)

With ``online.vllm_importance_cap``, the first part of L_t is multiplied by min(pi_old(y_t) / mu(y_t), cap), where mu is
the distribution that the sampler drew from. The mean over all tokens of the *global* batch. Responses without a reward
have no part in any of it.

**Choice** Mean and variance are those of the *whole rollout*, in float64, the variance divided by the number of tokens
less 1. Implementations that whiten what a rank or a micro-batch holds depend on how the batch is split.
**Choice** A response that was cut is over: no value is put behind its last token. ``online.cut_responses`` decides what
it is worth.
**Choice** The critic is a linear head on the policy's last hidden states, so that no second model is held. By default
it reads detached states: its loss is far larger than the policy's until it has learned the level of the rewards, and
would pull the policy's weights along, where a critic of its own has no such path.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.keys import key
from nemo_rao.objectives.base import Advantages, Needs, Objective, ObjectiveConfig, SampledTokens
from nemo_rao.objectives.metrics import pair_metrics
from nemo_rao.objectives.pairs import best_and_worst
from nemo_rao.objectives.reductions import metric, rewarded

_LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class PPOConfig(ObjectiveConfig):
    block = "ppo"

    kl_coef: float = key(0.05, "reward per nat of a token's log-ratio to the reference; 0: none is asked", low=0)
    gamma: float = key(1.0, "discount of a token's reward at the token before it", low=0, high=1)
    gae_lambda: float = key(0.95, "0: advantages trust the values; 1: the sampled rewards alone", low=0, high=1)
    clip: float = key(0.2, "the ratio counts no further from 1 than this", low=0, high=1)
    value_clip: float = key(0.2, "values count no further from those before the first step than this", low=0)
    value_weight: float = key(0.1, "of the value loss", low=0)
    critic: str = key(
        "head",
        "head: a linear head on the policy's states, which alone the value loss trains; shared: it trains the policy "
        "too",
        choices=("head", "shared"),
    )
    value_lr: float | None = key(
        None, "highest learning rate of the value head; null: that of the model", low=0, exclusive=True
    )


def ppo_advantages(sampled: SampledTokens, config: PPOConfig) -> Advantages:
    """Whitened advantages and returns of a rollout, in float64 until they are handed on.

    ``ppo/explained_variance``: 1 - var(R - V_old) / var(R), over tokens; 1 for values that know all returns, 0 for
    values that are the same everywhere. ``ppo/return``: mean of R. Neither where no response has a reward.
    """
    num_responses, lengths = len(sampled.lengths), sampled.lengths
    # Responses side by side, ``[N, longest]``, so that one pass from the back is over all of them.
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    known = ~np.isnan(sampled.rewards)

    def padded(values: np.ndarray) -> np.ndarray:
        made = np.zeros(mask.shape)
        made[mask] = values
        return made

    rewards, values = np.zeros(mask.shape), padded(sampled.values)
    if config.kl_coef > 0:
        assert sampled.reference is not None, "ppo was given no reference"
        rewards = -config.kl_coef * (padded(sampled.old) - padded(sampled.reference))
    rewards[np.arange(num_responses), lengths - 1] += np.where(known, sampled.rewards, 0)

    advantages = np.zeros(mask.shape)
    following, next_value = np.zeros(num_responses), np.zeros(num_responses)
    for t in reversed(range(mask.shape[1])):
        # Behind a response's end all of it is 0.
        delta = rewards[:, t] + config.gamma * next_value - values[:, t]
        following = delta + config.gamma * config.gae_lambda * following
        advantages[:, t], next_value = following, values[:, t]
    returns = advantages + values

    counted = mask & known[:, None]
    whitened, of_returns, metrics = np.zeros(mask.shape), np.zeros(mask.shape), {}
    if counted.any():
        of_counted, returns_counted = advantages[counted], returns[counted]
        variance = of_counted.var(ddof=1) if len(of_counted) > 1 else 0.0
        whitened[counted] = (of_counted - of_counted.mean()) / np.sqrt(variance + _LEAST_VARIANCE)
        of_returns[counted] = returns_counted
        metrics["ppo/return"] = float(returns_counted.mean())
        if (spread := returns_counted.var()) > 0:
            metrics["ppo/explained_variance"] = float(1 - (returns_counted - values[counted]).var() / spread)
    return Advantages(whitened[mask].astype(np.float32), of_returns[mask].astype(np.float32), metrics)


def ppo_loss(batch: ObjectiveBatch, config: PPOConfig) -> LossOutput:
    """Loss and metrics of P prompts with up to K responses.

    Means over tokens:

        ppo/ratio            w
        ppo/clipped          1 where clipping has taken the token's gradient away
        ppo/kl               log pi - log pi_ref, nats, with a reference
        ppo/advantage        \\|A\\|
        ppo/value            V
        ppo/value_loss       1/2 max(...), without its weight
        ppo/value_clipped    1 where clipping has taken the value's gradient away
    """
    tokens, mask = batch.tokens, rewarded(batch)[..., None]
    assert tokens is not None, "ppo was given no tokens"
    mask = mask & tokens.mask

    def at_tokens(values: Tensor | None) -> Tensor:
        assert values is not None, "ppo was not given all that it asks of a rollout"
        return torch.where(mask, values, 0)

    logps, values = at_tokens(tokens.logps), at_tokens(tokens.values)
    old, old_values, advantages, returns = (
        at_tokens(given).detach() for given in (tokens.old, tokens.old_values, tokens.advantages, tokens.returns)
    )

    ratio = (logps - old).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - config.clip, 1 + config.clip) * advantages
    error = (values - returns).square()
    bounded = torch.clamp(values, old_values - config.value_clip, old_values + config.value_clip)
    clipped_error = (bounded - returns).square()
    value_losses = 0.5 * torch.maximum(error, clipped_error)
    policy_losses = -torch.minimum(gain, clipped_gain)
    if tokens.importance is not None:
        policy_losses = at_tokens(tokens.importance).detach() * policy_losses
    losses = policy_losses + config.value_weight * value_losses

    num_tokens = mask.sum().to(losses.dtype)

    def over_tokens(numbers: Tensor) -> Tensor:
        return metric((torch.where(mask, numbers.detach(), 0).sum(), num_tokens))

    metrics = {
        "ppo/ratio": over_tokens(ratio),
        "ppo/clipped": over_tokens((clipped_gain < gain).to(losses.dtype)),
        "ppo/advantage": over_tokens(advantages.abs()),
        "ppo/value": over_tokens(values),
        "ppo/value_loss": over_tokens(value_losses),
        "ppo/value_clipped": over_tokens((clipped_error > error).to(losses.dtype)),
        **pair_metrics(batch, best_and_worst(batch)),
    }
    if tokens.reference is not None:
        metrics["ppo/kl"] = over_tokens(logps - at_tokens(tokens.reference))
    return LossOutput(torch.where(mask, losses, 0).sum(), num_tokens, metrics)


def mean_advantages(batch: ObjectiveBatch, config: PPOConfig) -> Tensor:
    """``[P, K]``, the mean of A over a response's tokens; 0 without a reward."""
    assert batch.tokens is not None and batch.tokens.advantages is not None, "ppo was given no advantages"
    mask = batch.tokens.mask & rewarded(batch)[..., None]
    return torch.where(mask, batch.tokens.advantages, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def needs_of_ppo(config: PPOConfig) -> Needs:
    """Without a KL, no reference."""
    return Needs(
        reference=config.kl_coef > 0,
        rewards=True,
        tokens=True,
        samples=True,
        values="tokens",
        value_gradient=config.critic == "shared",
    )


PPO = Objective(
    name="ppo",
    config_type=PPOConfig,
    loss=ppo_loss,
    needs=needs_of_ppo,
    formula="−min(w·A, clip(w, 1 − ε, 1 + ε)·A) + c·½·max((V − R)², (clip(V, V_old ± ε_v) − R)²), per token; A by GAE, "
    "whitened over the rollout",
    source="Schulman et al. 2017 (PPO), arXiv 1707.06347",
    checked="formula, gradients by hand (of the values too); GAE from its definition",
    advantages=ppo_advantages,
    response_advantages=mean_advantages,
)
