"""PPO, proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347), token by token, on fresh samples.

Computed before the first step on a rollout, from the policy that sampled (old), the reference and the values then:

    r_t   = -kl_coef (log pi_old(y_t) - log pi_ref(y_t)), at the last token + the response's reward
    d_t   = r_t + gamma V_old,t+1 - V_old,t,   V_old after the last token = 0
    A_t   = sum over l >= 0 of (gamma gae_lambda)^l d_t+l                       (Schulman et al. 2016, arXiv 1506.02438)
    R_t   = A_t + V_old,t
    A_t  <- (A_t - mean A) / sqrt(var A + 1e-8), over all tokens of the rollout

V_t = V(x, y_<t) is computed at the position that predicts y_t. In each step:

    w_t   = pi(y_t) / pi_old(y_t)
    L_t   = -min(w_t A_t, clip(w_t, 1 - clip, 1 + clip) A_t)
            + value_weight 1/2 max((V_t - R_t)^2, (clip(V_t, V_old,t - value_clip, V_old,t + value_clip) - R_t)^2)

The loss is the mean of L_t over all tokens of the *global* batch. Responses without a reward are ignored. With
``online.vllm_importance_cap``, the policy's part of L_t, not the critic's, is multiplied by
min(pi_old(y_t) / mu(y_t), cap), where mu is the distribution that the sampler drew from.

**Choice** Mean and variance are those of the *whole rollout*, in float64, with the variance divided by the number of
tokens minus 1. Implementations that whiten per rank or per micro-batch depend on how the batch is split.
**Choice** A truncated response counts as ended: no value follows its last token. ``online.cut_responses`` determines
its reward.
**Choice** By default the critic is a linear head on the policy's last hidden states, which needs no second model. The
states are detached: until the head has learned the level of the rewards, its loss is far larger than the policy's and
would dominate the gradient of the policy's weights. With ``critic: model`` it is a separate model, trained on the value
part without ``value_weight``, which would be redundant with its own optimizer's learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import LossOutput, ObjectiveBatch, Tokens
from nemo_rao.errors import UserError
from nemo_rao.keys import key
from nemo_rao.objectives.base import Advantages, Needs, Objective, ObjectiveConfig, SampledTokens
from nemo_rao.objectives.metrics import pair_metrics
from nemo_rao.objectives.pairs import best_and_worst
from nemo_rao.objectives.reductions import metric, rewarded

_LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class PPOConfig(ObjectiveConfig):
    block = "ppo"

    kl_coef: float = key(
        0.05, "reward per nat of a token's log-ratio to the reference; 0: no reference is needed", low=0
    )
    gamma: float = key(1.0, "discount factor per token", low=0, high=1)
    gae_lambda: float = key(0.95, "0: advantages rely on the values; 1: only on the sampled rewards", low=0, high=1)
    clip: float = key(0.2, "the ratio is clipped to 1 plus or minus this", low=0, high=1)
    value_clip: float = key(0.2, "values are clipped to those before the first step plus or minus this", low=0)
    value_weight: float = key(0.1, "weight of the value loss", low=0)
    critic: str = key(
        "head",
        "head: a linear head on the policy's states; the value loss trains only the head; shared: it also trains the "
        "policy; model: a second model, with a separate optimizer",
        choices=("head", "shared", "model"),
    )
    critic_path: str | None = key(
        None,
        "with critic=model: directory of a run, of a reward model or any other objective, whose last checkpoint "
        "initializes the critic; null: the policy's initial weights",
    )
    value_lr: float | None = key(None, "maximum learning rate of the critic; null: the model's", low=0, exclusive=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic != "model" and self.critic_path is not None:
            raise UserError(
                f"model.ppo.critic_path={self.critic_path}: has no effect with model.ppo.critic={self.critic}. Set "
                "model.ppo.critic to model, or leave critic_path out."
            )
        if self.critic == "model" and self.value_weight != PPOConfig.value_weight:
            raise UserError(
                f"model.ppo.value_weight={self.value_weight}: has no effect with model.ppo.critic=model, which has a "
                "separate optimizer. Set model.ppo.value_lr instead."
            )


def ppo_advantages(sampled: SampledTokens, config: PPOConfig) -> Advantages:
    """Compute whitened advantages and returns of a rollout, in float64; they are returned as float32.

    ``ppo/explained_variance``: 1 - var(R - V_old) / var(R), over tokens; 1 for values equal to the returns, 0 for
    constant values. ``ppo/return``: mean of R. Both are missing if no response has a reward.
    """
    num_responses, lengths = len(sampled.lengths), sampled.lengths
    # Padded to ``[N, longest]``, so that one backward recursion covers all responses.
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
        # All terms are 0 after the end of a response.
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
    """Loss and metrics of P prompts with up to K responses. Without the value part if the critic is a separate model.

    Means over tokens, in addition to those of :func:`ppo_value_loss`:

        ppo/ratio            w
        ppo/clipped          1 where clipping has removed the token's gradient
        ppo/kl               log pi - log pi_ref, nats, with a reference
        ppo/advantage        \\|A\\|
    """
    tokens, mask = _rewarded_tokens(batch)
    logps, old, advantages = (_at(mask, given) for given in (tokens.logps, tokens.old, tokens.advantages))
    old, advantages = old.detach(), advantages.detach()
    ratio = (logps - old).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - config.clip, 1 + config.clip) * advantages
    losses = -torch.minimum(gain, clipped_gain)
    if tokens.importance is not None:
        losses = _at(mask, tokens.importance).detach() * losses
    of_values: dict[str, Tensor] = {}
    if config.critic != "model":
        value_losses, of_values = _value_losses(tokens, mask, config)
        losses = losses + config.value_weight * value_losses
    metrics = {
        "ppo/ratio": _mean(mask, ratio),
        "ppo/clipped": _mean(mask, (clipped_gain < gain).to(losses.dtype)),
        "ppo/advantage": _mean(mask, advantages.abs()),
        **of_values,
        **pair_metrics(batch, best_and_worst(batch)),
    }
    if tokens.reference is not None:
        metrics["ppo/kl"] = _mean(mask, logps - _at(mask, tokens.reference))
    return LossOutput(torch.where(mask, losses, 0).sum(), mask.sum().to(losses.dtype), metrics)


def ppo_value_loss(batch: ObjectiveBatch, config: PPOConfig) -> LossOutput:
    """Loss and metrics of a critic that is a separate model.

    Means over tokens:

        ppo/value            V
        ppo/value_loss       1/2 max(...), without its weight
        ppo/value_clipped    1 where clipping has removed the value's gradient
    """
    tokens, mask = _rewarded_tokens(batch)
    losses, metrics = _value_losses(tokens, mask, config)
    return LossOutput(torch.where(mask, losses, 0).sum(), mask.sum().to(losses.dtype), metrics)


def _value_losses(tokens: Tokens, mask: Tensor, config: PPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Value losses 1/2 max(...), ``[P, K, L]``, and their metrics."""
    values = _at(mask, tokens.values)
    old_values, returns = _at(mask, tokens.old_values).detach(), _at(mask, tokens.returns).detach()
    error = (values - returns).square()
    bounded = torch.clamp(values, old_values - config.value_clip, old_values + config.value_clip)
    clipped_error = (bounded - returns).square()
    losses = 0.5 * torch.maximum(error, clipped_error)
    return losses, {
        "ppo/value": _mean(mask, values),
        "ppo/value_loss": _mean(mask, losses),
        "ppo/value_clipped": _mean(mask, (clipped_error > error).to(losses.dtype)),
    }


def _rewarded_tokens(batch: ObjectiveBatch) -> tuple[Tokens, Tensor]:
    """(tokens, ``[P, K, L]`` mask of those of responses with a reward)."""
    assert batch.tokens is not None, "ppo was given no tokens"
    return batch.tokens, rewarded(batch)[..., None] & batch.tokens.mask


def _at(mask: Tensor, values: Tensor | None) -> Tensor:
    assert values is not None, "a per-token input that ppo needs is missing"
    return torch.where(mask, values, 0)


def _mean(mask: Tensor, numbers: Tensor) -> Tensor:
    return metric((torch.where(mask, numbers.detach(), 0).sum(), mask.sum().to(numbers.dtype)))


def mean_advantages(batch: ObjectiveBatch, config: PPOConfig) -> Tensor:
    """``[P, K]``, mean of A over a response's tokens; 0 without a reward."""
    assert batch.tokens is not None and batch.tokens.advantages is not None, "ppo was given no advantages"
    mask = batch.tokens.mask & rewarded(batch)[..., None]
    return torch.where(mask, batch.tokens.advantages, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def needs_of_ppo(config: PPOConfig) -> Needs:
    """Requirements; the reference is only needed with a KL."""
    with_model = config.critic == "model"
    return Needs(
        reference=config.kl_coef > 0,
        rewards=True,
        tokens=True,
        samples=True,
        values=None if with_model else "tokens",
        value_gradient=config.critic == "shared",
        critic=with_model,
    )


_CRITIC = Objective(
    name="ppo",
    config_type=PPOConfig,
    loss=ppo_value_loss,
    needs=Needs(rewards=True, samples=True, values="tokens", value_gradient=True, values_alone=True),
    formula="½·max((V − R)², (clip(V, V_old ± ε_v) − R)²), per token",
    source="Schulman et al. 2017 (PPO), arXiv 1707.06347",
    checked="gradients by hand",
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
    critic=_CRITIC,
)
