"""SFT against its formula; which response is learned."""

import dataclasses

import pytest
import torch

from nemo_rao.objectives.sft import SFT, SFTConfig

from .batches import loss_and_gradients, make_batch, prompts_of


@pytest.mark.parametrize("rewards_known", [True, False])
def test_value_and_gradient_equal_the_formula(rewards_known: bool) -> None:
    batch = make_batch()
    loss, gradient = 0.0, torch.zeros_like(batch.response_logps)
    for entries in prompts_of(batch):
        best = max(entries, key=lambda entry: entry.reward) if rewards_known else entries[0]
        loss -= best.logp / best.length
        gradient[best.row, best.column] = -1 / best.length
    if not rewards_known:
        batch = dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, torch.nan))
    output, prompt_gradient, response_gradient = loss_and_gradients(SFT, batch, SFTConfig())
    torch.testing.assert_close(output.loss_sum.item(), loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(response_gradient, gradient, rtol=1e-10, atol=1e-10)
    assert output.num_prompts == 4 and not prompt_gradient.any()


def test_a_prompt_weight_adds_the_prompts_mean_negative_log_likelihood() -> None:
    batch, weight = make_batch(num_responses=(1, 1)), 0.5
    expected, gradient = 0.0, torch.zeros_like(batch.prompt_logps)
    for row in range(2):
        logp, length = float(batch.response_logps[row, 0]), float(batch.lengths[row, 0])
        prompt_logp, prompt_length = float(batch.prompt_logps[row, 0]), float(batch.prompt_lengths[row, 0])
        expected -= logp / length + weight * prompt_logp / prompt_length
        gradient[row, 0] = -weight / prompt_length
    output, prompt_gradient, _ = loss_and_gradients(SFT, batch, SFTConfig(prompt_weight=weight))
    torch.testing.assert_close(output.loss_sum.item(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prompt_gradient, gradient, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    batch = make_batch()

    def loss(responses: torch.Tensor) -> torch.Tensor:
        return SFT.loss(dataclasses.replace(batch, response_logps=responses), SFTConfig()).loss_sum

    assert torch.autograd.gradcheck(loss, batch.response_logps.clone().requires_grad_(), rtol=1e-8, atol=1e-8)


def test_no_reference_is_needed() -> None:
    batch = dataclasses.replace(make_batch(), reference_prompt_logps=None, reference_response_logps=None)
    assert SFT.loss(batch, SFTConfig()).loss_sum > 0


def test_one_response_is_learned_but_is_no_pair() -> None:
    output = SFT.loss(make_batch(num_responses=(1, 1)), SFTConfig())
    assert output.num_prompts == 2
    assert all(pair.tolist() == [0, 0] for pair in output.metrics.values())
