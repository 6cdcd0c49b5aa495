"""PPO: its advantages against their definition as sums, its loss and gradients against plain Python."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch, Tokens
from nemo_rao.objectives.base import Advantages, SampledTokens
from nemo_rao.objectives.ppo import PPO, PPOConfig, ppo_advantages

from .batches import make_batch

EXACT = {"rtol": 1e-10, "atol": 1e-12}
LENGTHS = (4, 1, 6, 3, 2)


def sampled(seed: int = 0) -> SampledTokens:
    """Five responses, of which the fourth has no reward."""
    generator = np.random.default_rng(seed)
    total = sum(LENGTHS)
    rewards = generator.normal(1, 2, len(LENGTHS))
    rewards[3] = np.nan
    old, other, values = generator.normal(-2, 1, (3, total)).astype(np.float32)
    return SampledTokens(np.array(LENGTHS), rewards, old, other, values)


def by_definition(rollout: SampledTokens, config: PPOConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(advantages before they are whitened, returns, which tokens count), with sums written out: O(L^2)."""
    advantages, returns, counted = [], [], []
    start = 0
    for length, reward in zip(rollout.lengths.tolist(), rollout.rewards.tolist(), strict=True):
        of = range(start, start + length)
        old, values = rollout.old.astype(float), rollout.values.astype(float)
        kl = [0.0] * length
        if config.kl_coef > 0:
            assert rollout.reference is not None
            kl = [old[i] - float(rollout.reference[i]) for i in of]
        is_known = not math.isnan(reward)
        r = [-config.kl_coef * kl[t] + (reward if is_known and t == length - 1 else 0.0) for t in range(length)]
        v = [*(values[i] for i in of), 0.0]
        for t in range(length):
            steps = range(t, length)
            delta = {s: r[s] + config.gamma * v[s + 1] - v[s] for s in steps}
            advantage = sum((config.gamma * config.gae_lambda) ** (s - t) * delta[s] for s in steps)
            advantages.append(advantage)
            returns.append(advantage + v[t])
            counted.append(is_known)
        start += length
    return np.array(advantages), np.array(returns), np.array(counted)


@pytest.mark.parametrize("keys", [{}, {"gamma": 0.9}, {"gae_lambda": 0.0}, {"gae_lambda": 1.0}, {"kl_coef": 0.7}])
def test_advantages_are_whitened_sums_of_the_definition(keys: dict[str, float]) -> None:
    config, rollout = PPO.make_config(keys), sampled()
    found = ppo_advantages(rollout, config)
    advantages, returns, counted = by_definition(rollout, config)
    of_counted = advantages[counted]
    whitened = (advantages - of_counted.mean()) / math.sqrt(of_counted.var(ddof=1) + 1e-8)
    # They are handed on in float32.
    np.testing.assert_allclose(found.advantages, np.where(counted, whitened, 0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.returns, np.where(counted, returns, 0), rtol=1e-6, atol=1e-7)
    assert found.advantages.dtype == found.returns.dtype == np.float32
    assert found.advantages.mean() == pytest.approx(0, abs=1e-6)
    values = rollout.values[counted].astype(float)
    explained = 1 - (returns[counted] - values).var() / returns[counted].var()
    assert found.metrics["ppo/explained_variance"] == pytest.approx(explained, rel=1e-12)
    assert found.metrics["ppo/return"] == pytest.approx(returns[counted].mean(), rel=1e-12)


def test_with_lambda_1_the_return_is_what_was_rewarded_from_there_on() -> None:
    rollout = sampled()
    found = ppo_advantages(rollout, PPO.make_config({"gae_lambda": 1.0, "kl_coef": 0.0}))
    expected = np.repeat(np.nan_to_num(rollout.rewards), rollout.lengths)
    np.testing.assert_allclose(found.returns, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["kl_coef", "gamma", "gae_lambda"])
def test_every_key_of_the_advantages_matters(name: str) -> None:
    first, other = (ppo_advantages(sampled(), PPO.make_config(keys)) for keys in ({}, {name: 0.5}))
    assert abs(first.returns - other.returns).max() > 1e-3


def test_values_that_know_all_explain_all() -> None:
    rollout = dataclasses.replace(sampled(), reference=None)
    values = np.repeat(np.nan_to_num(rollout.rewards), rollout.lengths).astype(np.float32)
    found = ppo_advantages(dataclasses.replace(rollout, values=values), PPO.make_config({"kl_coef": 0.0}))
    assert found.metrics["ppo/explained_variance"] == pytest.approx(1)
    assert abs(found.advantages).max() < 1e-2  # rounding, and the least variance


@pytest.mark.parametrize("which", ["no rewards", "one token", "equal rewards"])
def test_what_cannot_be_whitened_is_finite(which: str) -> None:
    rollout = sampled()
    if which == "no rewards":
        rollout = dataclasses.replace(rollout, rewards=np.full(len(LENGTHS), np.nan))
    elif which == "one token":
        rollout = SampledTokens(np.array([1]), np.array([2.0]), *np.zeros((3, 1), np.float32))
    else:
        zeros = np.zeros(sum(LENGTHS), np.float32)
        rollout = SampledTokens(np.array(LENGTHS), np.zeros(len(LENGTHS)), zeros, zeros, zeros)
    found: Advantages = ppo_advantages(rollout, PPO.make_config({}))
    assert not found.advantages.any()
    assert np.isfinite(found.returns).all() and all(map(math.isfinite, found.metrics.values()))


# ------------------------------------------------------------------------------------------------------------ the loss


def token_batch(seed: int = 0) -> ObjectiveBatch:
    """A float64 batch of prompts with 3, 2, 1 and 4 responses of 1 to 6 tokens; one response has no reward."""
    batch = make_batch(seed, (3, 2, 1, 4))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, batch.valid.shape, generator=generator)
    mask = (torch.arange(6) < lengths[..., None]) & batch.valid[..., None]

    def numbers(scale: float) -> Tensor:
        drawn = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
        return torch.where(mask, scale * drawn, 0)

    rewards = batch.rewards.clone()
    rewards[3, 2] = torch.nan
    logps, values = numbers(1) - 3, numbers(1)
    tokens = Tokens(
        logps=logps,
        mask=mask,
        old=logps + numbers(0.3),
        importance=numbers(0.3).exp(),
        reference=numbers(1) - 3,
        values=values,
        old_values=values + numbers(0.3),
        advantages=numbers(1),
        returns=numbers(1),
    )
    return dataclasses.replace(batch, rewards=rewards, tokens=tokens, response_logps=logps.sum(-1))


def by_hand(batch: ObjectiveBatch, config: PPOConfig) -> tuple[float, int, Tensor, Tensor, dict[str, float]]:
    """(sum, tokens, d sum / d logps, d sum / d values, sums of metrics) in plain Python, gradients written out."""
    tokens = batch.tokens
    assert tokens is not None
    given = {name: value.tolist() for name, value in vars(tokens).items()}
    by_logps, by_values = torch.zeros_like(tokens.logps), torch.zeros_like(tokens.logps)
    total, count = 0.0, 0
    sums = dict.fromkeys(("ratio", "clipped", "value", "value_loss", "value_clipped", "kl", "advantage"), 0.0)
    for p, k, t in tokens.mask.nonzero().tolist():
        if math.isnan(batch.rewards[p, k]):
            continue
        at = {name: value[p][k][t] for name, value in given.items()}
        count += 1
        ratio, a, weight = math.exp(at["logps"] - at["old"]), at["advantages"], at["importance"]
        is_clipped = (a > 0 and ratio > 1 + config.clip) or (a < 0 and ratio < 1 - config.clip)
        bound = 1 + config.clip if a > 0 else 1 - config.clip
        total -= weight * (bound * a if is_clipped else ratio * a)
        by_logps[p, k, t] = 0 if is_clipped else -weight * ratio * a
        v, old, r = at["values"], at["old_values"], at["returns"]
        bounded = min(max(v, old - config.value_clip), old + config.value_clip)
        value_is_clipped = abs(bounded - r) > abs(v - r)
        loss = 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
        total += config.value_weight * loss
        by_values[p, k, t] = 0 if value_is_clipped else config.value_weight * (v - r)
        own = {"ratio": ratio, "clipped": is_clipped, "value": v, "value_loss": loss, "advantage": abs(a)}
        own |= {"value_clipped": value_is_clipped, "kl": at["logps"] - at["reference"]}
        sums = {name: sums[name] + number for name, number in own.items()}
    return total, count, by_logps, by_values, sums


@pytest.mark.parametrize("keys", [{}, {"clip": 0.05, "value_clip": 0.5, "value_weight": 2.0}])
def test_ppo_is_its_formula(keys: dict[str, Any]) -> None:
    config, batch = PPO.make_config(keys), token_batch()
    assert batch.tokens is not None and batch.tokens.values is not None
    logps, values = batch.tokens.logps.clone().requires_grad_(), batch.tokens.values.clone().requires_grad_()
    given = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, logps=logps, values=values))
    output = PPO.loss(given, config)
    found = torch.autograd.grad(output.loss_sum, (logps, values))
    total, count, *expected, sums = by_hand(batch, config)
    torch.testing.assert_close(output.loss_sum.item(), total, **EXACT)
    assert float(output.num_prompts) == count
    torch.testing.assert_close(found, tuple(expected), **EXACT)
    for name, number in sums.items():
        torch.testing.assert_close(output.metrics[f"ppo/{name}"].tolist(), [float(number), float(count)], **EXACT)
    assert 0 < sums["clipped"] < count and 0 < sums["value_clipped"] < count


def test_a_critic_that_is_a_model_has_the_value_part_without_a_weight() -> None:
    config, batch = PPO.make_config({"critic": "model"}), token_batch()
    assert batch.tokens is not None and batch.tokens.values is not None and PPO.critic is not None
    of_policy = PPO.loss(dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, values=None)), config)
    values = batch.tokens.values.clone().requires_grad_()
    given = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, values=values))
    of_critic = PPO.critic.loss(given, config)
    without, count, *_ = by_hand(batch, PPO.make_config({"value_weight": 0.0}))
    both, _, _, expected, sums = by_hand(batch, PPO.make_config({"value_weight": 1.0}))
    torch.testing.assert_close(of_policy.loss_sum.item(), without, **EXACT)
    torch.testing.assert_close(of_critic.loss_sum.item(), both - without, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(of_critic.loss_sum, values)[0], expected, **EXACT)
    assert float(of_policy.num_prompts) == float(of_critic.num_prompts) == count
    assert not set(of_policy.metrics) & set(of_critic.metrics)
    for name, (total, number) in of_critic.metrics.items():
        torch.testing.assert_close([float(total), float(number)], [sums[name[4:]], float(count)], **EXACT)
    needs = PPO.needs_of(config)
    assert needs.critic and needs.values is None and PPO.critic.needs_of(config).values == "tokens"


def test_what_stands_in_masked_entries_does_not_matter() -> None:
    config, batch = PPO.make_config({}), token_batch()
    assert batch.tokens is not None
    mask = batch.tokens.mask & ~batch.rewards.isnan()[..., None]
    filled = {name: torch.where(mask, value, torch.nan) for name, value in vars(batch.tokens).items() if name != "mask"}
    logps, values = filled["logps"].requires_grad_(), filled["values"].requires_grad_()
    dirty = dataclasses.replace(batch, tokens=Tokens(mask=batch.tokens.mask, **filled))
    expected, found = PPO.loss(batch, config), PPO.loss(dirty, config)
    assert found.loss_sum == expected.loss_sum
    for name in (name for name in expected.metrics if name.startswith("ppo/")):
        assert (found.metrics[name] == expected.metrics[name]).all(), name
    for gradient in torch.autograd.grad(found.loss_sum, (logps, values)):
        assert gradient.isfinite().all() and not gradient[~mask].any()


def test_the_policy_that_sampled_has_the_gradient_of_its_advantages() -> None:
    """On the first step, where every ratio is 1."""
    batch = token_batch()
    assert batch.tokens is not None and batch.tokens.advantages is not None
    logps = batch.tokens.logps.clone().requires_grad_()
    tokens = dataclasses.replace(batch.tokens, logps=logps, old=logps.detach(), importance=None)
    (gradient,) = torch.autograd.grad(
        PPO.loss(dataclasses.replace(batch, tokens=tokens), PPO.make_config({})).loss_sum, logps
    )
    counted = batch.tokens.mask & ~batch.rewards.isnan()[..., None]
    torch.testing.assert_close(gradient, torch.where(counted, -batch.tokens.advantages, 0), **EXACT)


@pytest.mark.parametrize(
    ("keys", "need", "expected"),
    [
        ({}, "reference", True),
        ({"kl_coef": 0.0}, "reference", False),
        ({}, "value_gradient", False),
        ({"critic": "shared"}, "value_gradient", True),
    ],
)
def test_what_is_needed_follows_from_the_keys(keys: dict[str, Any], need: str, expected: bool) -> None:
    assert getattr(PPO.needs_of(PPO.make_config(keys)), need) is expected
