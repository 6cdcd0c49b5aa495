"""Objectives of the policy's own samples: rloo beside rpo's sqloo, and grpo, whose loss is of tokens."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch, Tokens
from nemo_rao.objectives.grpo import GRPO
from nemo_rao.objectives.rloo import RLOO
from nemo_rao.objectives.rpo import RPO

from .batches import loss_and_gradients, make_batch

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("beta", [0.03, 0.5])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_gradient_is_that_of_sqloo_up_to_a_constant(beta: float, count: int) -> None:
    batch = make_batch(1, (count,) * 4)
    _, _, gradient = loss_and_gradients(RLOO, batch, RLOO.make_config({"beta": beta}))
    keys = {"distance": "sqloo", "beta": beta, "eta": 1.0, "sft_weight": 0.0}
    _, _, of_sqloo = loss_and_gradients(RPO, batch, RPO.make_config(keys))
    torch.testing.assert_close(of_sqloo, beta * count**2 / (count - 1) * gradient, **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_trls(beta: float) -> None:
    """Gradient alone: TRL's value is that of ratios, which are 1 on fresh samples, ours of log-ratios."""
    batch = make_batch(2, (4,) * 3)
    _, _, gradient = loss_and_gradients(RLOO, batch, RLOO.make_config({"beta": beta}))
    logps = batch.response_logps.detach().clone().requires_grad_()
    (of_trl,) = torch.autograd.grad(trls_rloo(batch, logps, beta), logps)
    torch.testing.assert_close(gradient / len(batch.valid), of_trl, **EXACT)


def trls_rloo(batch: ObjectiveBatch, logps: Tensor, beta: float) -> Tensor:
    """The loss of TRL's ``RLOOTrainer``, of responses of one token, each better by its reward less its share of the KL
    than the others of its prompt are on average. TRL computes these advantages while it samples: here by hand."""
    pytest.importorskip("trl")
    from trl.trainer.rloo_trainer import RLOOTrainer

    from .trl_reference import in_float64, make_trainer

    rewards = batch.rewards - beta * (logps.detach() - batch.reference_response_logps)
    num = rewards.shape[1]
    advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (num - 1)
    rows = logps.flatten()
    trainer = make_trainer(
        RLOOTrainer,
        accelerator=one_process(),
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows[:, None], torch.zeros_like(rows)[:, None], None),
    )
    ids = torch.ones(len(rows), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": ids,
        "advantages": advantages.flatten(),
        "old_logps": rows.detach(),
    }
    with in_float64():
        loss: Tensor = RLOOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss


def one_process() -> SimpleNamespace:
    """An accelerator whose collectives have nobody else to ask."""
    return SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )


# --------------------------------------------------------------------------------------------------------------- grpo


def token_batch(seed: int = 0, *, old: bool = True, reference: bool = True) -> ObjectiveBatch:
    """A float64 batch of prompts with 3, 2, 1 and 4 responses of 1 to 6 tokens; one response has no reward."""
    batch = make_batch(seed, (3, 2, 1, 4))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, batch.valid.shape, generator=generator)
    mask = (torch.arange(6) < lengths[..., None]) & batch.valid[..., None]

    def numbers() -> Tensor:
        return torch.where(mask, -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64), 0)

    rewards = batch.rewards.clone()
    rewards[3, 2] = torch.nan
    logps, behind, other = numbers(), numbers(), numbers()
    tokens = Tokens(
        logps=logps,
        mask=mask,
        old=0.7 * logps + 0.3 * behind if old else None,
        importance=numbers().exp() if old else None,
        reference=other if reference else None,
    )
    return dataclasses.replace(batch, rewards=rewards, tokens=tokens, response_logps=logps.sum(-1))


def by_hand(batch: ObjectiveBatch, config: Any) -> tuple[float, float, Tensor]:
    """(sum, count, d sum / d logps) in plain Python: gradients written out, none of the package's functions."""
    tokens = batch.tokens
    assert tokens is not None
    gradient = torch.zeros_like(tokens.logps)
    total, count = 0.0, 0.0
    for p in range(len(batch.valid)):
        ks = [k for k in range(batch.valid.shape[1]) if batch.valid[p, k] and not math.isnan(batch.rewards[p, k])]
        of = {k: [t for t in range(6) if tokens.mask[p, k, t]] for k in ks}
        rho = {
            (k, t): float(tokens.logps[p, k, t] - tokens.reference[p, k, t]) if tokens.reference is not None else 0.0
            for k in ks
            for t in of[k]
        }
        kl = {
            "k1": lambda x: (x, 1.0),
            "k2": lambda x: (x * x / 2, x),
            "k3": lambda x: (math.exp(-x) - 1 + x, 1 - math.exp(-x)),
        }[config.kl]
        shaped = {
            k: float(batch.rewards[p, k])
            - (config.beta * sum(kl(rho[k, t])[0] for t in of[k]) if config.kl_in == "reward" else 0.0)
            for k in ks
        }
        mean = sum(shaped.values()) / max(len(ks), 1)
        deviation = 1.0
        if config.scale == "std":
            deviation = math.sqrt(sum((r - mean) ** 2 for r in shaped.values()) / max(len(ks) - 1, 1)) + 1e-6
        for k in ks:
            advantage = (shaped[k] - mean) / deviation
            share = {
                "sequence": 1 / len(of[k]),
                "token": 1.0,
                "constant": 1 / config.constant_length,
            }[config.normalize]
            count += len(of[k]) if config.normalize == "token" else 1
            for t in of[k]:
                old = tokens.logps[p, k, t] if tokens.old is None else tokens.old[p, k, t]
                ratio = math.exp(float(tokens.logps[p, k, t] - old))
                bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                weight = share if tokens.importance is None else share * float(tokens.importance[p, k, t])
                total -= weight * min(ratio * advantage, bounded * advantage)
                if ratio * advantage <= bounded * advantage:
                    gradient[p, k, t] -= weight * ratio * advantage
                if config.kl_in == "loss":
                    total += share * config.beta * kl(rho[k, t])[0]
                    gradient[p, k, t] += share * config.beta * kl(rho[k, t])[1]
    return total, count, gradient


CASES: list[dict[str, Any]] = [
    {},
    {"beta": 0.3},
    {"beta": 0.3, "kl": "k1", "clip_low": 0.1, "clip_high": 0.28},
    {"beta": 0.3, "kl": "k2", "normalize": "token"},
    {"beta": 0.3, "kl_in": "reward", "kl": "k1", "scale": "none", "normalize": "constant", "constant_length": 7.0},
    {"beta": 0.3, "kl_in": "reward", "kl": "k3", "normalize": "token", "clip_high": 2.0},
]


@pytest.mark.parametrize("keys", CASES, ids=lambda keys: ",".join(f"{k}={v}" for k, v in keys.items()) or "defaults")
@pytest.mark.parametrize("old", [True, False], ids=["older samples", "fresh samples"])
def test_grpo_is_its_formula(keys: dict[str, Any], old: bool) -> None:
    config = GRPO.make_config(keys)
    batch = token_batch(old=old, reference=GRPO.needs_of(config).reference)
    assert batch.tokens is not None
    logps = batch.tokens.logps.clone().requires_grad_()
    output = GRPO.loss(dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, logps=logps)), config)
    (gradient,) = torch.autograd.grad(output.loss_sum, logps)
    total, count, expected = by_hand(batch, config)
    torch.testing.assert_close(output.loss_sum.item(), total, **EXACT)
    assert float(output.num_prompts) == count
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert expected.any() and not gradient[~batch.tokens.mask].any()
    clipped, num_tokens = output.metrics["grpo/clipped"].tolist()
    assert num_tokens == sum(
        int(batch.tokens.mask[p, k].sum())
        for p, k in batch.valid.nonzero().tolist()
        if not math.isnan(batch.rewards[p, k])
    )
    assert (clipped > 0) == old


def test_what_stands_in_masked_entries_does_not_matter() -> None:
    config, batch = GRPO.make_config({"beta": 0.3}), token_batch()
    tokens = batch.tokens
    assert tokens is not None and tokens.old is not None and tokens.reference is not None
    filled = {
        name: torch.where(tokens.mask, getattr(tokens, name), torch.nan)
        for name in ("logps", "old", "importance", "reference")
    }
    dirty = dataclasses.replace(batch, tokens=Tokens(mask=tokens.mask, **filled))
    expected, found = GRPO.loss(batch, config), GRPO.loss(dirty, config)
    assert found.loss_sum == expected.loss_sum
    for name, value in expected.metrics.items():
        assert (found.metrics[name] == value).all(), name


def of_trl(batch: ObjectiveBatch, config: Any, loss_type: str) -> Tensor:
    """The loss of TRL's ``GRPOTrainer`` over the same responses with the same advantages, and its gradient's root."""
    from collections import defaultdict

    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    from .trl_reference import in_float64, make_trainer

    tokens = batch.tokens
    assert tokens is not None
    chosen = batch.valid & ~batch.rewards.isnan()
    logps, mask = tokens.logps[chosen], tokens.mask[chosen]
    advantages = torch.zeros_like(batch.rewards)
    for p in range(len(batch.valid)):
        rewards = batch.rewards[p, chosen[p]]
        deviation = rewards.std() if len(rewards) > 1 else torch.zeros(())
        scale = deviation.double() + 1e-6 if config.scale == "std" else 1.0
        advantages[p, chosen[p]] = (rewards - rewards.mean()) / scale
    trainer = make_trainer(
        GRPOTrainer,
        accelerator=one_process(),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        beta=config.beta,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        max_completion_length=config.constant_length,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=tokens.importance is not None,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    ids = torch.ones_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages[chosen],
        "old_per_token_logps": None if tokens.old is None else tokens.old[chosen],
        "ref_per_token_logps": None if tokens.reference is None else tokens.reference[chosen],
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": None if tokens.importance is None else tokens.importance[chosen],
    }
    with in_float64():
        loss: Tensor = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    return loss


@pytest.mark.parametrize(
    ("loss_type", "keys"),
    [
        ("grpo", {"beta": 0.3}),
        ("dapo", {"beta": 0.0, "normalize": "token", "clip_high": 0.28}),
        ("dr_grpo", {"beta": 0.1, "normalize": "constant", "constant_length": 7.0, "scale": "none"}),
    ],
)
@pytest.mark.parametrize("old", [True, False], ids=["older samples", "fresh samples"])
def test_grpo_is_trls(loss_type: str, keys: dict[str, Any], old: bool) -> None:
    config = GRPO.make_config(keys)
    batch = token_batch(old=old, reference=GRPO.needs_of(config).reference)
    assert batch.tokens is not None
    logps = batch.tokens.logps.clone().requires_grad_()
    batch = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, logps=logps))
    output = GRPO.loss(batch, config)
    ours = output.loss_sum / output.num_prompts
    theirs = of_trl(batch, config, loss_type)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] for loss in (ours, theirs)), **EXACT)
