"""Every objective against its formula in plain Python: value, gradient by hand, gradient by finite differences."""

import dataclasses

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.registry import OBJECTIVES

from .batches import loss_and_gradients, make_batch, masked
from .formulas import FORMULAS, PAIRS, answers_of, defaults, dro_by_value

EXACT = {"rtol": 1e-10, "atol": 1e-12}
CASES: dict[str, list[dict[str, object]]] = {
    "ipo": [{}, {"beta": 0.5, "length_normalized": True, "sft_weight": 0.3}],
    "cal_dpo": [{}, {"beta": 0.02, "calibration_weight": 0.5, "sft_weight": 0.3}],
    "slic": [{}, {"delta": 12.0, "lam": 5.0, "sft_weight": 0.3}, {"delta": 0.0, "lam": 0.0}],
    "hinge": [{}, {"beta": 0.02, "sft_weight": 0.3}],
    "simpo": [{}, {"beta": 1.0, "gamma": 0.3, "sft_weight": 0.3}],
    "alphapo": [
        {},
        {"alpha": 0.1, "beta": 1.0, "gamma": 0.7, "sft_weight": 0.3},
        {"alpha": 0.0, "beta": 1.0},
        {"alpha": -0.5},
    ],
    "orpo": [{}, {"lam": 2.0, "sft_weight": 0.3}],
    "dpop": [{}, {"beta": 0.05, "lam": 0.2, "sft_weight": 0.3}, {"lam": 0.0}],
    "dpo_shift": [{}, {"beta": 0.1, "f": 0.75, "sft_weight": 0.3}, {"f": 1.0}],
    "r_dpo": [{}, {"beta": 0.02, "alpha": 0.2, "sft_weight": 0.3}, {"alpha": 0.0}],
    "sppo": [
        {},
        {"eta": 40.0, "win_probability": "rewards", "sft_weight": 0.3},
        {"eta": 40.0, "win_probability": "bradley_terry"},
    ],
    "robust_po": [{}, {"beta": 0.5, "gamma": 0.4}, {"beta": 0.05, "sft_weight": 0.3}],
    "rpo": [
        {},
        *({"distance": distance, "eta": 0.3} for distance in ("bwd", "fwd", "sq", "sqloo")),
        *(
            {"distance": distance, "beta": 0.4, "explicit": "constant", "gap": 2.5, "margin": 0.8, "sft_weight": 0.3}
            for distance in ("bwd", "fwd", "sq", "sqloo")
        ),
        {"use_reference": False, "length_normalized": True, "beta": 2.0, "margin": 1.0, "eta": 3.0},
        {"distance": "sqloo", "length_normalized": True, "beta": 2.0, "sft_weight": 1e-5},
        {"distance": "sq", "use_reference": False, "beta": 0.01, "explicit": "constant"},
    ],
    "dro": [{}, {"tau": 0.2, "value_lr": 1e-5}],
    "kto": [
        {},
        {"beta": 0.02, "desirable_weight": 1.5, "undesirable_weight": 0.4, "threshold": 3.0},
        {"threshold": 1.0, "desirable_weight": 0.0},
    ],
    "rpo_partition": [{}, {"tau": 0.7}],
    "kimi": [{}, {"tau": 1.5}],
    "agro": [{}, {"beta": 0.6}],
    "qrpo": [{}, {"beta": 0.4, "exact_log_z": True}, {"beta": 0.02}],
    "nca": [{}, {"beta": 0.1, "alpha": 3.0}],
    "rloo": [{}, {"beta": 0.5}],
}
BATCHES = ("rewarded", "ranked", "ranked without rewards", "holes, ties", "unknown rewards", "plain")


def full_batch(kind: str, seed: int = 0) -> ObjectiveBatch:
    """A float64 batch with whatever any objective may ask for; ``plain`` is without what may be left out."""
    batch = make_batch(
        seed, (4, 4, 4, 4, 4) if kind == "holes, ties" else (2, 3, 1, 4), ranked=kind.startswith("ranked")
    )
    rewards, valid, ranked = batch.rewards.clone(), batch.valid.clone(), batch.ranked.clone()
    if kind == "ranked without rewards":
        rewards[:] = torch.nan
    if kind == "holes, ties":
        valid = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]).bool()
        rewards[0] = torch.tensor([9.0, 1.5, 1.5, -0.5])
        rewards[4] = torch.tensor([2.0, 2.0, 9.0, 1.0])
        ranked[[1, 4]] = True
    if kind == "unknown rewards":
        ranked[0] = True
        rewards[0] = torch.nan
        rewards[1, 1] = torch.nan
    batch = masked(dataclasses.replace(batch, rewards=rewards, valid=valid, ranked=ranked), 0.0)
    return dataclasses.replace(batch, **(plain_extras(batch) if kind == "plain" else extras(batch, seed)))


def extras(batch: ObjectiveBatch, seed: int) -> dict[str, Tensor]:
    """What some objectives ask for: three reward models, up to seven reference rewards, values, KTO's log-ratio."""
    generator = torch.Generator().manual_seed(seed + 1)
    num_prompts, widest = batch.valid.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 10 - 2

    reference_rewards = uniform(num_prompts, 7)
    reference_rewards[0, 3:] = torch.nan
    reference_rewards[1] = torch.nan
    return {
        "reward_ensemble": uniform(num_prompts, widest, 3).where(batch.valid[..., None], 0),
        "reference_rewards": reference_rewards,
        "values": uniform(num_prompts, widest).where(batch.valid, 0),
        "kl_estimate": torch.tensor(1.25, dtype=torch.float64),
    }


def plain_extras(batch: ObjectiveBatch) -> dict[str, Tensor | None]:
    """One reward model, no reference rewards, and a fall of mismatched responses, so that KTO's z0 is 0."""
    fall = torch.tensor(-3.0, dtype=torch.float64)
    return {
        "reward_ensemble": None,
        "reference_rewards": None,
        "values": batch.rewards / 2,
        "kl_estimate": fall,
    }


def applies(name: str, keys: dict, kind: str) -> bool:
    """Whether the objective is defined where rewards are missing."""
    by_order = name in PAIRS - {"robust_po"} or name == "nca" or keys.get("explicit") == "constant"
    reads_rewards = keys.get("win_probability", "labels") != "labels"
    if kind == "ranked without rewards":
        return (by_order and not reads_rewards) or (name == "kto" and "threshold" not in keys)
    return kind != "unknown rewards" or (by_order and not reads_rewards)


def batch_for(kind: str, keys: dict, seed: int = 0) -> ObjectiveBatch:
    """The batch, its rewards made probabilities where they are read as such."""
    batch = full_batch(kind, seed)
    if keys.get("win_probability") == "rewards":
        batch = dataclasses.replace(batch, rewards=torch.where(batch.valid, (batch.rewards + 2) / 12, 0))
    return batch


def expected(name: str, batch: ObjectiveBatch, keys: dict) -> tuple[float, int, Tensor]:
    """``(loss_sum, num_prompts, d loss_sum / d response_logps)`` by the formula."""
    results = [FORMULAS[name](answers, **keys) for answers in answers_of(batch)]
    gradient = torch.zeros_like(batch.response_logps)
    for row, (_, by_column) in enumerate(results):
        for column, value in by_column.items():
            gradient[row, column] = value
    losses = [loss for loss, _ in results if loss is not None]
    return sum(losses), len(losses), gradient


def describe(keys: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in keys.items()) or "defaults"


CONFIGS = [pytest.param(name, keys, id=f"{name}-{describe(keys)}") for name in CASES for keys in CASES[name]]
CONFIGS_AND_BATCHES = [
    pytest.param(name, keys, kind, id=f"{name}-{describe(keys)}-{kind}")
    for name in CASES
    for keys in CASES[name]
    for kind in BATCHES
    if applies(name, keys, kind)
]


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_tried_away_from_its_default(name: str) -> None:
    tried = {key for keys in CASES[name] for key, value in keys.items() if value != defaults(name)[key]}
    assert tried == defaults(name).keys()


def test_every_objective_has_a_formula() -> None:
    assert CASES.keys() == FORMULAS.keys()
    assert OBJECTIVES.keys() - FORMULAS.keys() <= {"rao", "dpo", "sft", "rm", "rm_regression", "grpo", "ppo"}, (
        "with tests of their own"
    )


@pytest.mark.parametrize("name", CASES)
def test_keys_and_defaults(name: str) -> None:
    assert dataclasses.asdict(OBJECTIVES[name].config_type()) == defaults(name)


@pytest.mark.parametrize(("name", "keys", "kind"), CONFIGS_AND_BATCHES)
def test_value_and_gradient_equal_the_formula(name: str, keys: dict, kind: str) -> None:
    batch = batch_for(kind, keys)
    loss_sum, num_prompts, gradient = expected(name, batch, keys)
    output, prompt_gradient, response_gradient = loss_and_gradients(
        OBJECTIVES[name], batch, OBJECTIVES[name].make_config(keys)
    )
    assert num_prompts > 0 and gradient.any(), "or this test compares nothing"
    assert output.num_prompts == num_prompts
    torch.testing.assert_close(output.loss_sum.item(), loss_sum, **EXACT)
    torch.testing.assert_close(response_gradient, gradient, **EXACT)
    assert not prompt_gradient.any()


# The slope of rloo is not that of its value, as its advantages carry no gradient.
@pytest.mark.parametrize(("name", "keys"), [case for case in CONFIGS if case.values[0] != "rloo"])
def test_gradcheck(name: str, keys: dict) -> None:
    batch, config = batch_for("rewarded", keys, seed=3), OBJECTIVES[name].make_config(keys)

    def loss(responses: Tensor) -> Tensor:
        return OBJECTIVES[name].loss(dataclasses.replace(batch, response_logps=responses), config).loss_sum

    leaf = batch.response_logps.clone().requires_grad_()
    if name != "dro":  # a stop gradient: what is differentiated is not the slope of the value
        assert torch.autograd.gradcheck(loss, leaf, eps=1e-4, rtol=1e-6, atol=1e-6)
        return
    values = batch.values
    assert values is not None
    by_hand = expected(name, batch, keys)[2]
    policy_loss_only = 1 / (1 + config.tau)  # the loss is (1/tau + 1) 1/2 e^2, of which 1/tau reaches the policy
    with torch.no_grad():
        for row, column in batch.valid.nonzero().tolist():
            step = torch.zeros_like(leaf)
            step[row, column] = 1e-4
            slope = (loss(leaf + step) - loss(leaf - step)) / 2e-4 * policy_loss_only
            torch.testing.assert_close(slope, by_hand[row, column], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keys", CASES["dro"], ids=describe)
@pytest.mark.parametrize("kind", ["rewarded", "holes, ties"])
def test_dro_value_gradient_equals_the_formula_and_does_not_reach_the_policy(keys: dict, kind: str) -> None:
    batch, objective = full_batch(kind), OBJECTIVES["dro"]
    config = objective.make_config(keys)
    assert batch.values is not None
    values = batch.values.clone().requires_grad_()
    loss = objective.loss(dataclasses.replace(batch, values=values), config).loss_sum
    (gradient,) = torch.autograd.grad(loss, values)
    by_hand = torch.zeros_like(gradient)
    for row, answers in enumerate(answers_of(batch)):
        for column, value in dro_by_value(answers, config.tau).items():
            by_hand[row, column] = value
    assert by_hand.any()
    torch.testing.assert_close(gradient, by_hand, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_reference_sums_carry_no_gradient(name: str) -> None:
    batch, objective = full_batch("rewarded"), OBJECTIVES[name]
    assert batch.reference_response_logps is not None and batch.reference_prompt_logps is not None
    batch = dataclasses.replace(
        batch,
        response_logps=batch.response_logps.clone().requires_grad_(),
        reference_response_logps=batch.reference_response_logps.clone().requires_grad_(),
        reference_prompt_logps=batch.reference_prompt_logps.clone().requires_grad_(),
    )
    objective.loss(batch, objective.config_type()).loss_sum.backward()
    assert batch.response_logps.grad is not None
    assert batch.reference_response_logps.grad is None and batch.reference_prompt_logps.grad is None
