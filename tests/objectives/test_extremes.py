"""Numbers at the far ends of what training meets, in float32: log-ratios of 10,000 nats, certain responses, noise."""

import dataclasses

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.registry import OBJECTIVES

from .batches import loss_and_gradients, make_config
from .formulas import FORMULAS, PAIRS
from .test_formulas import CASES, batch_for, describe, expected

FAR = 1e4
NEEDS = {name: each.needs_of(each.config_type()) for name, each in OBJECTIVES.items()}
# Those of sums over responses. What a loss makes of tokens that are this far off is for its clipping to say.
POLICY_OBJECTIVES = [name for name, needs in NEEDS.items() if not needs.scores and not needs.tokens]
CONFIGS = [
    pytest.param(name, keys, id=f"{name}-{describe(keys)}")
    for name in POLICY_OBJECTIVES
    for keys in CASES.get(name, [{}])
]
# Losses of pairs that aim at a margin of a certain size; all others keep raising it.
WITH_TARGET = {"ipo", "cal_dpo", "sppo", "robust_po"}
MONOTONE = sorted({"dpo", *PAIRS} - WITH_TARGET)


def single(batch: ObjectiveBatch) -> ObjectiveBatch:
    """The batch in float32."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    floating = {name: x.float() for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return dataclasses.replace(batch, **floating)


def double(batch: ObjectiveBatch) -> ObjectiveBatch:
    """The same numbers in float64."""
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    floating = {name: x.double() for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return dataclasses.replace(batch, **floating)


def two_responses(keys: dict, logps: list[float], reference_logp: float, length: float) -> ObjectiveBatch:
    """Two ranked and two rewarded prompts, whose first response is the better one, each with both orders of logps."""
    batch = batch_for("rewarded", keys)
    better_first = batch.rewards.sort(-1, descending=True)[0][[3, 3, 3, 3], :2]
    both_orders = torch.tensor([logps, logps[::-1]] * 2)
    extras = {"reward_ensemble": better_first[..., None] * torch.tensor([1.0, 0.5, 2.0]), "values": better_first / 2}
    return single(
        dataclasses.replace(
            batch,
            prompt_logps=torch.full((4, 2), -50.0),
            reference_prompt_logps=torch.full((4, 2), -48.0),
            response_logps=both_orders,
            reference_response_logps=torch.full((4, 2), reference_logp),
            rewards=better_first,
            lengths=torch.full((4, 2), length),
            prompt_lengths=torch.full((4, 2), 9.0),
            valid=torch.ones(4, 2, dtype=torch.bool),
            ranked=torch.tensor([True, True, False, False]),
            **extras,
        )
    )


EXTREMES = {
    "log-ratios of 10,000 nats": {"logps": [-FAR, -3 * FAR], "reference_logp": -2 * FAR, "length": 500.0},
    "one log-ratio of 10,000 nats": {"logps": [-100.0, -100 - FAR], "reference_logp": -100.0, "length": 500.0},
    "10,000 nats a token": {"logps": [-1.0, -FAR], "reference_logp": -1.0, "length": 1.0},
    "10,000 nats a token in both": {"logps": [-FAR, -FAR - 1], "reference_logp": -FAR, "length": 1.0},
    "an almost certain response": {"logps": [-1e-4, -5.0], "reference_logp": -1e-3, "length": 10.0},
    "a certain response": {"logps": [0.0, -5.0], "reference_logp": -1.0, "length": 10.0},
    "two certain responses": {"logps": [0.0, 0.0], "reference_logp": 0.0, "length": 10.0},
}


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize(("name", "keys"), CONFIGS)
def test_loss_and_gradient_stay_finite(name: str, keys: dict, extreme: str) -> None:
    batch, objective = two_responses(keys, **EXTREMES[extreme]), OBJECTIVES[name]
    output, prompt_gradient, gradient = loss_and_gradients(objective, batch, make_config(objective, keys))
    assert output.loss_sum.isfinite()
    assert prompt_gradient.isfinite().all() and gradient.isfinite().all()
    assert all(pair.isfinite().all() for pair in output.metrics.values())


def unbounded(name: str, keys: dict, extreme: str) -> bool:
    """Where the formula itself is infinite, or beyond float32: the code must choose (the test above)."""
    if name == "alphapo":
        return keys.get("alpha", 0.25) > 0 and extreme.startswith("10,000 nats a token")
    return name == "orpo" and extreme in ("a certain response", "two certain responses")


@pytest.mark.parametrize(
    ("name", "keys", "extreme"),
    [
        pytest.param(name, keys, extreme, id=f"{name}-{describe(keys)}-{extreme}")
        for name in FORMULAS
        for keys in CASES[name]
        for extreme in EXTREMES
        if not unbounded(name, keys, extreme)
    ],
)
def test_float32_keeps_the_formulas_value(name: str, keys: dict, extreme: str) -> None:
    batch, objective = two_responses(keys, **EXTREMES[extreme]), OBJECTIVES[name]
    loss_sum, _, by_hand = expected(name, double(batch), keys)
    output, _, gradient = loss_and_gradients(objective, batch, make_config(objective, keys))
    torch.testing.assert_close(output.loss_sum.double().item(), loss_sum, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient.double(), by_hand, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", MONOTONE)
@pytest.mark.parametrize(
    "extreme", ["log-ratios of 10,000 nats", "one log-ratio of 10,000 nats", "10,000 nats a token"]
)
def test_the_wrong_order_is_still_corrected(name: str, extreme: str) -> None:
    batch, objective = two_responses({}, **EXTREMES[extreme]), OBJECTIVES[name]
    _, _, gradient = loss_and_gradients(objective, batch, make_config(objective))
    assert (gradient[1::2, 0] < 0).all(), "the better response, less probable, is raised"
    assert (gradient[1::2, 1] >= 0).all()


# The slope of rloo is not that of its value, as its advantages carry no gradient.
@pytest.mark.parametrize(("name", "keys"), [case for case in CONFIGS if case.values[0] != "rloo"])
@pytest.mark.parametrize("bits", [9, 14])
def test_noise_moves_the_loss_by_what_its_slope_says(name: str, keys: dict, bits: int) -> None:
    """L(x + h) - L(x) in float32 is the integral of dL/dx . h in float64, h = 2^-bits |x| in the steepest direction.

    bfloat16 rounds by up to 2^-9. Noise that small is not to be amplified, nor are smaller steps to be lost.
    """
    batch, objective = batch_for("rewarded", keys), OBJECTIVES[name]
    config = make_config(objective, keys)
    direction = loss_and_gradients(objective, batch, config)[2].sign()
    step = 2.0**-bits * batch.response_logps.abs() * direction

    def at(fraction: float) -> ObjectiveBatch:
        return dataclasses.replace(batch, response_logps=batch.response_logps + fraction * step)

    places = [(place + 0.5) / 16 for place in range(16)]
    slopes = torch.stack([(loss_and_gradients(objective, at(place), config)[2] * step).sum() for place in places])
    # A response moves both squares of dro by the same amount; the gradient is that of the first, 1/tau of the second.
    expected_change = float(slopes.mean()) * (1 + config.tau if name == "dro" else 1)
    before, after = (objective.loss(single(at(fraction)), config).loss_sum.item() for fraction in (0.0, 1.0))
    assert expected_change > 0
    assert abs(after - before - expected_change) <= 0.05 * expected_change + 2e-6 * abs(before)


@pytest.mark.parametrize(("name", "keys"), [case for case in CONFIGS if case.values[0] in FORMULAS])
def test_float32_follows_the_formula_through_the_noise_of_bfloat16(name: str, keys: dict) -> None:
    batch, objective = batch_for("rewarded", keys), OBJECTIVES[name]
    signs = torch.randint(0, 2, batch.valid.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = single(dataclasses.replace(batch, response_logps=batch.response_logps * (1 + signs * 2.0**-9)))
    loss_sum, _, by_hand = expected(name, double(noisy), keys)
    output, _, gradient = loss_and_gradients(objective, noisy, make_config(objective, keys))
    torch.testing.assert_close(output.loss_sum.double().item(), loss_sum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), by_hand, rtol=1e-4, atol=1e-6)
