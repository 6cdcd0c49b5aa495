"""RAO against its formula in plain Python, and what must hold whatever the numbers."""

import dataclasses
import math

import pytest
import torch

from nemo_rao.batch import RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.objectives.rao import RAO, RAOConfig

from .batches import loss_and_gradients, make_batch, prompts_of

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = [
    RAOConfig(log_z0=50.0),
    RAOConfig(beta=0.5, log_z0=-7.0),
    RAOConfig(beta=0.05, log_z0=500, prefix_gradient=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_value_and_gradient_equal_the_formula(config: RAOConfig) -> None:
    batch = make_batch()
    loss, gradient = 0.0, torch.zeros_like(batch.response_logps)
    for entries in prompts_of(batch):
        for entry in entries:
            error = entry.reward - config.beta * (entry.rho + config.log_z0 + entry.rho_x)
            loss += error**2 / entry.count
            gradient[entry.row, entry.column] = -2 * config.beta * error / entry.count
    output, prompt_gradient, response_gradient = loss_and_gradients(RAO, batch, config)
    torch.testing.assert_close(output.loss_sum.item(), loss, **EXACT)
    assert output.num_prompts == 4
    torch.testing.assert_close(response_gradient, gradient, **EXACT)
    torch.testing.assert_close(prompt_gradient, gradient if config.prefix_gradient else 0 * gradient, **EXACT)


def test_no_gradient_through_the_prompt_unless_asked_for() -> None:
    _, prompt_gradient, _ = loss_and_gradients(RAO, make_batch(), RAOConfig(log_z0=50.0))
    assert not prompt_gradient.any()


@pytest.mark.parametrize("shift", [-100.0, 0.5, 300.0])
def test_raising_log_z0_lowers_every_reward_alike(shift: float) -> None:
    batch, config = make_batch(), RAOConfig(beta=0.2, log_z0=10.0)
    lowered = dataclasses.replace(batch, rewards=batch.rewards - config.beta * shift)
    with_shift = loss_and_gradients(RAO, batch, dataclasses.replace(config, log_z0=10.0 + shift))
    with_lower_rewards = loss_and_gradients(RAO, lowered, config)
    torch.testing.assert_close(with_shift[0].loss_sum, with_lower_rewards[0].loss_sum, **EXACT)
    torch.testing.assert_close(with_shift[1:], with_lower_rewards[1:], **EXACT)


def test_differences_of_targets_do_not_depend_on_log_z0() -> None:
    def half_gradients(log_z0: float) -> torch.Tensor:
        return loss_and_gradients(RAO, make_batch(num_responses=(3, 3)), RAOConfig(log_z0=log_z0))[2].diff(dim=1)

    torch.testing.assert_close(half_gradients(-50.0), half_gradients(400.0), **EXACT)


def test_at_the_reference_every_r_hat_is_beta_log_z0() -> None:
    batch = make_batch()
    batch = dataclasses.replace(
        batch, prompt_logps=batch.reference_prompt_logps, response_logps=batch.reference_response_logps
    )
    config = RAOConfig(beta=0.3, log_z0=20.0)
    output, _, gradient = loss_and_gradients(RAO, batch, config)
    num_valid = batch.valid.sum(-1, keepdim=True)
    expected = torch.where(batch.valid, -2 * 0.3 * (batch.rewards - 0.3 * 20.0) / num_valid, 0)
    torch.testing.assert_close(gradient, expected, **EXACT)
    for name in ("rao/r_hat_chosen", "rao/r_hat_rejected"):
        total, count = output.metrics[name]
        torch.testing.assert_close(total / count, torch.tensor(0.3 * 20.0, dtype=torch.float64), **EXACT)
    assert output.metrics["rao/prompt_logratio"].tolist() == [0, 4]


def test_the_fixed_point_has_no_loss_and_no_gradient() -> None:
    batch, config = make_batch(), RAOConfig(beta=0.1, log_z0=50.0)
    rho_x = batch.prompt_logps - batch.reference_prompt_logps
    rho = batch.rewards / config.beta - config.log_z0 - rho_x
    at_target = dataclasses.replace(batch, response_logps=batch.reference_response_logps + rho)
    output, _, gradient = loss_and_gradients(RAO, at_target, config)
    assert output.loss_sum < 1e-24
    assert gradient.abs().max() < 1e-13


def test_the_fixed_point_is_exact_in_numbers_that_binary_can_hold() -> None:
    batch = make_batch(num_responses=(2, 2))
    entries = {
        "prompt_logps": -8.0,
        "reference_prompt_logps": -6.0,
        "reference_response_logps": -32.0,
        "response_logps": -32.0 + 4.0 / 0.5 - 3.0 + 2.0,
        "rewards": 4.0,
    }
    values = {name: torch.full((2, 2), value) for name, value in entries.items()}
    config = RAOConfig(beta=0.5, log_z0=3.0)
    output, _, gradient = loss_and_gradients(RAO, dataclasses.replace(batch, **values), config)
    assert output.loss_sum == 0 and not gradient.any()


@pytest.mark.parametrize("config", CONFIGS)
def test_gradcheck(config: RAOConfig) -> None:
    batch = make_batch()

    def loss(responses: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        moved = dataclasses.replace(batch, response_logps=responses, prompt_logps=prompts)
        return RAO.loss(moved, dataclasses.replace(config, prefix_gradient=True)).loss_sum

    leaves = (batch.response_logps.clone().requires_grad_(), batch.prompt_logps.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves, eps=1e-4, rtol=1e-6, atol=1e-6)


def test_metrics_are_means_over_prompts() -> None:
    batch, config = make_batch(), RAOConfig(beta=0.2, log_z0=5.0)
    output = RAO.loss(batch, config)
    error = log_z = rho_x = 0.0
    chosen, rejected = [], []
    for entries in prompts_of(batch):
        for entry in entries:
            r_hat = config.beta * (entry.rho + config.log_z0 + entry.rho_x)
            error += abs(entry.reward - r_hat) / entry.count
            log_z += (config.log_z0 + entry.rho_x) / entry.count
            rho_x += entry.rho_x / entry.count
        if len(entries) > 1:
            chosen.append(max(entries, key=lambda entry: entry.reward))
            rejected.append(min(entries, key=lambda entry: entry.reward))
    beta = config.beta
    margins = [beta * (w.rho - z.rho) for w, z in zip(chosen, rejected, strict=True)]
    expected = {
        "rao/target_error": (error, 4),
        "rao/log_z": (log_z, 4),
        "rao/prompt_logratio": (rho_x, 4),
        "rao/r_hat_chosen": (sum(beta * (e.rho + e.rho_x + config.log_z0) for e in chosen), 3),
        "rao/r_hat_rejected": (sum(beta * (e.rho + e.rho_x + config.log_z0) for e in rejected), 3),
        "rewards/chosen": (sum(beta * e.rho for e in chosen), 3),
        "rewards/rejected": (sum(beta * e.rho for e in rejected), 3),
        "rewards/margins": (sum(margins), 3),
        "rewards/accuracies": (sum(w.rho > z.rho for w, z in zip(chosen, rejected, strict=True)), 3),
        "rewards/log_loss": (sum(math.log1p(math.exp(-margin)) for margin in margins), 3),
        "rewards/brier": (sum((1 / (1 + math.exp(margin))) ** 2 for margin in margins), 3),
        "logps/chosen": (sum(e.logp for e in chosen), 3),
        "logps/rejected": (sum(e.logp for e in rejected), 3),
        "data/reward_chosen": (sum(e.reward for e in chosen), 3),
        "data/reward_rejected": (sum(e.reward for e in rejected), 3),
    }
    assert output.metrics.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(output.metrics[name], torch.tensor(pair, dtype=torch.float64), **EXACT)


def test_auto_log_z0_starts_the_mean_target_at_zero() -> None:
    batch = make_batch()
    reward_mean = float((batch.rewards.sum(-1) / batch.valid.sum(-1)).mean())  # over prompts, of means over responses
    config = RAO.resolve(RAOConfig(beta=0.3, log_z0="auto"), RewardSummary(reward_mean))
    targets = batch.rewards / config.beta - config.log_z0  # rho at which the loss is zero, where rho_x = 0
    mean_target = (torch.where(batch.valid, targets, 0).sum(-1) / batch.valid.sum(-1)).mean()
    assert abs(mean_target) < 1e-12


def test_a_number_for_log_z0_is_kept() -> None:
    assert RAO.resolve(RAOConfig(log_z0=3.0), 7.0) == RAOConfig(log_z0=3.0)


def test_log_z0_is_fitted_to_the_data_unless_it_is_set() -> None:
    """The paper's 50, on rewards from 0 to 1, would ask every response to lose 40 nats or more."""
    rewards = RewardSummary(mean=0.6, low=0.0, high=1.0)
    assert RAOConfig().log_z0 == "auto"
    resolved = RAO.resolve(RAOConfig(), rewards)
    assert resolved.log_z0 == pytest.approx(6.0)
    assert RAO.mean_target(resolved, rewards).nats == pytest.approx(0.0)
    far = RAO.mean_target(RAOConfig(log_z0=50.0), rewards)
    assert far.nats == pytest.approx(-44.0) and far.remedy == "model.rao.log_z0=6 (auto)"


def test_auto_log_z0_without_rewards_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.rao\.log_z0=auto.*reward"):
        RAO.resolve(RAOConfig(log_z0="auto"), RewardSummary())


def test_unresolved_auto_log_z0_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="resolved"):
        RAO.loss(make_batch(), RAOConfig(log_z0="auto"))


def test_a_response_without_reward_has_no_part_in_the_loss() -> None:
    batch = make_batch(num_responses=(3, 2))
    rewards, valid = batch.rewards.clone(), batch.valid.clone()
    rewards[0, 1], valid[0, 1] = torch.nan, False
    unknown = loss_and_gradients(RAO, dataclasses.replace(batch, rewards=rewards), RAOConfig(log_z0=50.0))
    left_out = loss_and_gradients(RAO, dataclasses.replace(batch, valid=valid), RAOConfig(log_z0=50.0))
    torch.testing.assert_close(unknown[0].loss_sum, left_out[0].loss_sum, **EXACT)
    torch.testing.assert_close(unknown[1:], left_out[1:], **EXACT)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"beta": 0}, r"model\.rao\.beta=0: must be > 0"),
        ({"beta": "0.1"}, r"model\.rao\.beta='0\.1': must be a number"),
        ({"beta": True}, r"model\.rao\.beta=True: must be a number"),
        ({"log_z0": float("nan")}, r"model\.rao\.log_z0=nan: must be finite"),
        ({"log_z0": "Auto"}, r"model\.rao\.log_z0='Auto': must be a number, in nats, or auto"),
        ({"prefix_gradient": 1}, r"model\.rao\.prefix_gradient=1: must be true or false"),
        ({"log_z": 50}, r"unknown key model\.rao\.log_z; did you mean log_z0\?"),
        ({"temperature": 1}, r"unknown key model\.rao\.temperature; there are beta, log_z0, prefix_gradient"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_name(keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RAO.make_config(keys)
