"""DPO, cDPO and robust DPO against their formulas in plain Python."""

import dataclasses
import math

import pytest
import torch

from nemo_rao.errors import UserError
from nemo_rao.objectives.dpo import DPO, DPOConfig

from .batches import loss_and_gradients, make_batch, prompts_of, sigmoid

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = {
    "dpo": DPOConfig(),
    "cdpo": DPOConfig(beta=0.3, label_smoothing=0.2),
    "robust": DPOConfig(beta=0.3, label_smoothing=0.2, robust=True),
    "robust without smoothing": DPOConfig(robust=True),
    "with sft": DPOConfig(beta=0.01, sft_weight=0.7),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_value_and_gradient_equal_the_formula(name: str) -> None:
    batch, config = make_batch(), CONFIGS[name]
    beta, epsilon, weight = config.beta, config.label_smoothing, config.sft_weight
    loss, gradient = 0.0, torch.zeros_like(batch.response_logps)
    for entries in prompts_of(batch):
        pairs = [(w, other) for w in entries for other in entries if w.reward > other.reward]
        for chosen, rejected in pairs:
            p = sigmoid(beta * (chosen.rho - rejected.rho))
            if config.robust:
                of_pair = (-(1 - epsilon) * math.log(p) + epsilon * math.log(1 - p)) / (1 - 2 * epsilon)
                slope = beta * (-(1 - epsilon) * (1 - p) - epsilon * p) / (1 - 2 * epsilon)
            else:
                of_pair = -(1 - epsilon) * math.log(p) - epsilon * math.log(1 - p)
                slope = beta * (p - (1 - epsilon))
            loss += (of_pair - weight * chosen.logp / chosen.length) / len(pairs)
            gradient[chosen.row, chosen.column] += (slope - weight / chosen.length) / len(pairs)
            gradient[rejected.row, rejected.column] -= slope / len(pairs)
    output, prompt_gradient, response_gradient = loss_and_gradients(DPO, batch, config)
    torch.testing.assert_close(output.loss_sum.item(), loss, **EXACT)
    torch.testing.assert_close(response_gradient, gradient, **EXACT)
    assert output.num_prompts == 3 and not prompt_gradient.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck(name: str) -> None:
    batch = make_batch(1)

    def loss(responses: torch.Tensor) -> torch.Tensor:
        return DPO.loss(dataclasses.replace(batch, response_logps=responses), CONFIGS[name]).loss_sum

    assert torch.autograd.gradcheck(loss, batch.response_logps.clone().requires_grad_(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rho", [1e4, -1e4])
def test_large_log_ratios_stay_finite_in_float32(name: str, rho: float) -> None:
    batch = make_batch(num_responses=(2, 2))
    logps = torch.tensor([[rho, -rho], [-rho, rho]])
    values = {"response_logps": logps, "reference_response_logps": torch.zeros(2, 2), "lengths": torch.ones(2, 2)}
    config = dataclasses.replace(CONFIGS[name], beta=1.0)
    output, _, gradient = loss_and_gradients(DPO, dataclasses.replace(batch, **values), config)
    assert output.loss_sum.isfinite() and gradient.isfinite().all()
    assert gradient.abs().max() > 0.5, "the wrong order is still corrected"


def test_at_the_reference_the_loss_is_log_2() -> None:
    batch = make_batch()
    batch = dataclasses.replace(batch, response_logps=batch.reference_response_logps)
    output = DPO.loss(batch, DPOConfig())
    torch.testing.assert_close((output.loss_sum / output.num_prompts).item(), math.log(2), **EXACT)
    assert output.metrics["rewards/accuracies"].tolist() == [0, 3], "no better than the other is not right"


def test_cdpo_is_smallest_where_sigma_is_one_minus_epsilon() -> None:
    batch, config = make_batch(num_responses=(2,)), DPOConfig(beta=0.5, label_smoothing=0.1)
    delta = math.log(0.9 / 0.1) / config.beta
    chosen = int(batch.rewards[0].argmax())
    logps = batch.reference_response_logps.clone()
    logps[0, chosen] += delta
    _, _, gradient = loss_and_gradients(DPO, dataclasses.replace(batch, response_logps=logps), config)
    assert gradient.abs().max() < 1e-12


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    """(1 - eps) L(w, l) + eps L(l, w) = the loss of clean labels."""
    epsilon, batch = 0.3, make_batch(num_responses=(2, 2, 2))
    flipped = dataclasses.replace(batch, rewards=-batch.rewards)
    robust = DPOConfig(label_smoothing=epsilon, robust=True)
    expected = (1 - epsilon) * DPO.loss(batch, robust).loss_sum + epsilon * DPO.loss(flipped, robust).loss_sum
    torch.testing.assert_close(expected, DPO.loss(batch, DPOConfig()).loss_sum, **EXACT)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beta": -0.1}, r"model\.dpo\.beta=-0\.1: must be > 0"),
        ({"label_smoothing": 0.5}, r"model\.dpo\.label_smoothing=0\.5: must be < 0\.5"),
        ({"label_smoothing": 0.6}, r"model\.dpo\.label_smoothing=0\.6: must be <= 0\.5.*below 0\.5"),
        ({"label_smoothing": -0.1}, r"model\.dpo\.label_smoothing=-0\.1: must be >= 0"),
        ({"robust": "yes"}, r"model\.dpo\.robust='yes': must be true or false"),
        ({"sft_weight": -1.0}, r"model\.dpo\.sft_weight=-1\.0: must be >= 0"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPO.make_config(keys)
