"""Where each objective comes to rest, and which of them see differences between rewards only."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch, RewardSummary
from nemo_rao.objectives.registry import OBJECTIVES

from .batches import loss_and_gradients, make_config
from .formulas import (
    Answer,
    answers_of,
    best_of,
    log_softmax,
    mean,
    partition_value,
    qrpo_target,
)
from .test_formulas import batch_for, describe

few = settings(max_examples=50, derandomize=True)
BETA, TAU, CONSTANT = 0.4, 0.8, 1.7


class Rest(NamedTuple):
    """``rho(answers)``: log-ratios of a prompt's responses at which the gradient is zero."""

    name: str
    keys: dict[str, object]
    rho: Callable[[list[Answer]], list[float]]
    any_number: bool = True  # of responses; else two


def chosen_and_rejected(of_chosen: float, of_rejected: float) -> Callable[[list[Answer]], list[float]]:
    return lambda ys: [of_chosen if y is best_of(ys) else of_rejected for y in ys]


def constant_gap(gap: float, margin: float) -> Callable[[list[Answer]], list[float]]:
    return lambda ys: [(CONSTANT + (gap + margin if y is best_of(ys) else 0)) / BETA for y in ys]


def nca_rest(answers: list[Answer]) -> list[float]:
    """q s(-u) = s(u)/K, so that e^u = K q."""
    return [(math.log(len(answers)) + log_q) / BETA for log_q in log_softmax([y.reward / 3.0 for y in answers])]


RESTS = [
    Rest("rao", {"beta": BETA, "log_z0": 5.0}, lambda ys: [y.reward / BETA - 5.0 - y.rho_x for y in ys]),
    Rest("ipo", {"beta": 0.25}, chosen_and_rejected(7.0, 5.0), any_number=False),
    Rest(
        "ipo",
        {"beta": 0.25, "length_normalized": True},
        lambda ys: [y.length * (3.0 if y is best_of(ys) else 1.0) for y in ys],
        any_number=False,
    ),
    Rest(
        "dpo",
        {"beta": BETA, "label_smoothing": 0.2},
        chosen_and_rejected(CONSTANT + math.log(0.8 / 0.2) / BETA, CONSTANT),
        any_number=False,
    ),
    Rest("hinge", {"beta": BETA}, chosen_and_rejected(3.0, 0.4), any_number=False),
    Rest("sppo", {"eta": 10.0}, chosen_and_rejected(5.0, -5.0), any_number=False),
    Rest("sppo", {"eta": 10.0, "win_probability": "rewards"}, lambda ys: [10.0 * (y.reward - 0.5) for y in ys]),
    Rest(
        "sppo",
        {"eta": 10.0, "win_probability": "bradley_terry"},
        lambda ys: [10.0 * (1 / (1 + math.exp(sum(z.reward for z in ys) - 2 * y.reward)) - 0.5) for y in ys],
        any_number=False,
    ),
    Rest("robust_po", {"beta": BETA}, lambda ys: [(y.reward + CONSTANT) / BETA for y in ys]),
    *(
        Rest(
            "rpo",
            {"distance": distance, "beta": BETA, "eta": 1.5},
            lambda ys: [(1.5 * y.reward + CONSTANT) / BETA for y in ys],
        )
        for distance in ("bwd", "fwd", "sq", "sqloo")
    ),
    *(
        Rest(
            "rpo",
            {"distance": distance, "beta": BETA, "explicit": "constant", "gap": 2.0, "margin": 0.5},
            constant_gap(2.0, 0.5),
        )
        for distance in ("bwd", "fwd", "sq", "sqloo")
    ),
    Rest("dro", {"tau": TAU}, lambda ys: [(y.reward - y.value) / TAU for y in ys]),
    Rest(
        "rpo_partition",
        {"tau": TAU},
        lambda ys: [y.length * (y.reward - partition_value(ys, TAU)) / TAU for y in ys],
    ),
    Rest("kimi", {"tau": TAU}, lambda ys: [(y.reward - mean([z.reward for z in ys])) / TAU for y in ys]),
    Rest("agro", {"beta": BETA}, lambda ys: [(y.reward + CONSTANT) / BETA for y in ys]),
    Rest("qrpo", {"beta": BETA}, lambda ys: [qrpo_target(y, ys, BETA, exact_log_z=False) / BETA for y in ys]),
    Rest(
        "qrpo",
        {"beta": BETA, "exact_log_z": True},
        lambda ys: [qrpo_target(y, ys, BETA, exact_log_z=True) / BETA for y in ys],
    ),
    Rest("nca", {"beta": BETA, "alpha": 3.0}, nca_rest),
]


def gradient_of(name: str, keys: dict, batch: ObjectiveBatch) -> Tensor:
    return loss_and_gradients(OBJECTIVES[name], batch, make_config(OBJECTIVES[name], keys))[2]


def moved(batch: ObjectiveBatch, rho: Callable[[list[Answer]], list[float]]) -> ObjectiveBatch:
    """The batch with the policy at the given log-ratios to the reference."""
    assert batch.reference_response_logps is not None
    logps = batch.reference_response_logps.clone()
    for answers in answers_of(batch):
        for answer, of_answer in zip(answers, rho(answers), strict=True):
            logps[answer.row, answer.column] += of_answer
    return dataclasses.replace(batch, response_logps=logps)


@pytest.mark.parametrize("rest", RESTS, ids=lambda rest: f"{rest.name}-{describe(rest.keys)}")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gradient_is_zero_at_the_fixed_point_and_not_beside_it(rest: Rest, seed: int) -> None:
    batch = batch_for("plain", rest.keys, seed)
    if not rest.any_number:
        batch = dataclasses.replace(batch, valid=batch.valid & (torch.arange(4) < 2))
    at_rest = moved(batch, rest.rho)
    assert gradient_of(rest.name, rest.keys, at_rest).abs().max() <= 1e-12

    def off_target(answers: list[Answer]) -> list[float]:
        return [rho - 3.0 * (y is best_of(answers)) for y, rho in zip(answers, rest.rho(answers), strict=True)]

    beside = moved(batch, off_target)
    assert gradient_of(rest.name, rest.keys, beside).abs().max() > 1e-3


@few
@given(rho=st.floats(-100, 100), mismatched=st.floats(-20, 20))
def test_kto_never_comes_to_rest(rho: float, mismatched: float) -> None:
    batch = dataclasses.replace(batch_for("ranked", {}), kl_estimate=torch.tensor(mismatched).double())
    gradient = gradient_of("kto", {"beta": 0.1}, moved(batch, lambda answers: [rho] * len(answers)))
    first = torch.arange(4) == 0
    assert (gradient[batch.valid & first] < 0).all() and (gradient[batch.valid & ~first] > 0).all()


# Objectives whose loss depends, with default keys, on the level of rewards: VARIANT has them.
ON_LEVEL = ("rao", "dro", "kto")
OF_POLICIES = [name for name, each in OBJECTIVES.items() if not each.needs_of(each.config_type()).scores]
# Of ppo, the loss: its advantages and returns, in which the rewards are, are worked out before it (test_ppo.py).
INVARIANT: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in OF_POLICIES if name not in ON_LEVEL),
    ("sppo", {"win_probability": "bradley_terry"}),
    *(("rpo", {"distance": distance}) for distance in ("bwd", "fwd", "sq", "sqloo")),
    ("rpo", {"explicit": "constant"}),
]
VARIANT: list[tuple[str, dict[str, object], float]] = [
    ("rao", {}, 4.0),
    ("dro", {}, 4.0),
    ("kto", {"threshold": 3.0}, 4.0),
    ("sppo", {"win_probability": "rewards"}, 0.1),
]


def shifted(batch: ObjectiveBatch, shift: float) -> ObjectiveBatch:
    """The batch with a constant added to all that stands for a reward."""
    names = ("rewards", "reward_ensemble", "reference_rewards")
    present = {name: tensor for name in names if (tensor := getattr(batch, name)) is not None}
    return dataclasses.replace(batch, **{name: tensor + shift for name, tensor in present.items()})


def value_and_gradient(name: str, keys: dict, batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
    output, _, gradient = loss_and_gradients(OBJECTIVES[name], batch, make_config(OBJECTIVES[name], keys))
    return output.loss_sum.detach(), gradient


@pytest.mark.parametrize(("name", "keys"), INVARIANT)
@settings(max_examples=5, derandomize=True)
@given(
    kind=st.sampled_from(["rewarded", "plain", "ranked", "holes, ties"]),
    seed=st.integers(0, 1000),
    shift=st.floats(-50, 50),
)
def test_a_constant_added_to_all_rewards_changes_nothing(
    name: str, keys: dict, kind: str, seed: int, shift: float
) -> None:
    batch = batch_for(kind, {}, seed)
    before, after = value_and_gradient(name, keys, batch), value_and_gradient(name, keys, shifted(batch, shift))
    assert before[1].any()
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "keys", "shift"), VARIANT)
def test_a_constant_added_to_all_rewards_moves_the_target(name: str, keys: dict, shift: float) -> None:
    batch = batch_for("rewarded", keys)
    before, after = value_and_gradient(name, keys, batch), value_and_gradient(name, keys, shifted(batch, shift))
    assert (after[0] - before[0]).abs() > 1e-3 and (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "keys"), [*((name, keys) for name, keys, _ in VARIANT), *INVARIANT])
def test_the_mean_target_is_where_the_loss_rests_when_all_rewards_are_the_mean(name: str, keys: dict) -> None:
    """Known of each objective that fits log-ratios to rewards, and of no other: at these log-ratios nothing moves."""
    objective, rewards = OBJECTIVES[name], RewardSummary(mean=0.8, low=0.8, high=0.8, all_labels=True, all_ranked=True)
    config = objective.make_config({**keys, "log_z0": 3.0} if name == "rao" else keys)
    target = objective.mean_target(config, rewards)
    if (name, keys) in INVARIANT or name == "kto":  # kto compares rewards with its threshold alone
        assert target is None
        return
    assert target is not None and abs(target.nats) > 0.1
    batch = batch_for("ranked", keys)
    batch = dataclasses.replace(
        batch,
        rewards=torch.full_like(batch.rewards, 0.8),
        values=torch.zeros_like(batch.rewards),
        prompt_logps=batch.reference_prompt_logps,
    )
    resting = moved(batch, lambda answers: [target.nats] * len(answers))
    assert loss_and_gradients(objective, resting, config)[2].abs().max() < 1e-9
    beside = moved(batch, lambda answers: [target.nats + 1] * len(answers))
    assert loss_and_gradients(objective, beside, config)[2].abs().max() > 1e-3
