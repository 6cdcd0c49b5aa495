"""Losses of reward models against their formulas in plain Python, with gradients by hand."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch, RewardSummary
from nemo_rao.errors import UserError
from nemo_rao.objectives.reward_model import RM, RM_REGRESSION

from .batches import make_batch, sigmoid

EXACT = {"rtol": 1e-10, "atol": 1e-12}
NAN = float("nan")


def loss_and_gradient(objective, batch: ObjectiveBatch, **keys):  # type: ignore[no-untyped-def]
    scores = batch.scores.clone().requires_grad_()
    output = objective.loss(dataclasses.replace(batch, scores=scores), objective.make_config(keys))
    return output, torch.autograd.grad(output.loss_sum, scores)[0]


@pytest.mark.parametrize("keys", [{}, {"center": 0.0}, {"margin": 0.7, "center": 0.3}])
@pytest.mark.parametrize("ranked", [False, True])
def test_bradley_terry_is_the_formula(keys: dict, ranked: bool) -> None:
    """d/ds_w = -sigmoid(-(s_w - s_l - m)) + 2 c (s_w + s_l), d/ds_l = sigmoid(...) + 2 c (s_w + s_l)."""
    batch = make_batch(3, (2, 3, 1, 4), ranked)
    margin, center = keys.get("margin", 0.0), keys.get("center", 0.01)
    loss, gradient = 0.0, torch.zeros_like(batch.scores)
    for p, row in enumerate(batch.valid.tolist()):
        columns = [k for k, valid in enumerate(row) if valid]
        rewards, scores = batch.rewards[p].tolist(), batch.scores[p, :, 0].tolist()
        better = (lambda i, j: i < j) if ranked else (lambda i, j, r=rewards: r[i] > r[j])
        pairs = [(i, j) for i in columns for j in columns if better(i, j)]
        for i, j in pairs:
            wrong = sigmoid(-(scores[i] - scores[j] - margin * (rewards[i] - rewards[j])))
            loss += (-math.log(1 - wrong) + center * (scores[i] + scores[j]) ** 2) / len(pairs)
            pull = 2 * center * (scores[i] + scores[j])
            gradient[p, i, 0] += (-wrong + pull) / len(pairs)
            gradient[p, j, 0] += (wrong + pull) / len(pairs)
    output, got = loss_and_gradient(RM, batch, **keys)
    torch.testing.assert_close(output.loss_sum.item(), loss, **EXACT)
    torch.testing.assert_close(got, gradient, **EXACT)
    assert output.num_prompts == 3


def test_accuracy_confidence_and_brier_are_those_of_the_pairs() -> None:
    batch = make_batch(0, (2, 2), ranked=True)
    scores = torch.tensor([[[2.0], [0.0]], [[0.0], [1.0]]], dtype=torch.float64)
    metrics = RM.loss(dataclasses.replace(batch, scores=scores), RM.make_config({})).metrics
    right, wrong = sigmoid(2.0), sigmoid(-1.0)
    expected = {
        "rm/accuracy": [1, 2],
        "rm/confidence": [right + (1 - wrong), 2],
        "rm/brier": [(1 - right) ** 2 + (1 - wrong) ** 2, 2],
        "rewards/margins": [2.0 - 1.0, 2],
        "rewards/log_loss": [-math.log(right) - math.log(wrong), 2],
        "rewards/brier": [(1 - right) ** 2 + (1 - wrong) ** 2, 2],
    }
    for name, value in expected.items():
        assert metrics[name].tolist() == pytest.approx(value, rel=1e-12), name


def attributes_batch() -> tuple[ObjectiveBatch, Tensor]:
    batch = make_batch(1, (2, 1))
    labels = torch.tensor([[[1.0, NAN, 3.0], [-100.0, 2.0, 0.0]], [[NAN, -100.0, NAN], [0.0, 0.0, 0.0]]])
    scores = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return dataclasses.replace(batch, reward_ensemble=labels.double(), scores=scores), scores


def test_regression_is_the_mean_over_known_attributes() -> None:
    batch, scores = attributes_batch()
    s = scores.tolist()
    first = ((s[0][0][0] - 1) ** 2 + (s[0][0][2] - 3) ** 2) / 2
    second = ((s[0][1][1] - 2) ** 2 + s[0][1][2] ** 2) / 2
    output, gradient = loss_and_gradient(RM_REGRESSION, batch)
    assert float(output.loss_sum) == pytest.approx((first + second) / 2, rel=1e-12)
    assert output.num_prompts == 1, "a response without known attributes has no part"
    expected = torch.zeros_like(scores)
    expected[0, 0, 0], expected[0, 0, 2] = (s[0][0][0] - 1) / 2, (s[0][0][2] - 3) / 2
    expected[0, 1, 1], expected[0, 1, 2] = (s[0][1][1] - 2) / 2, s[0][1][2] / 2
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_one_reward_is_one_attribute() -> None:
    batch = make_batch(2, (2, 2))
    output, _ = loss_and_gradient(RM_REGRESSION, batch)
    expected = (batch.scores[:, :, 0] - batch.rewards).square().mean(-1).sum()
    torch.testing.assert_close(output.loss_sum, expected, **EXACT)


def test_the_head_has_a_score_for_each_attribute_of_the_data() -> None:
    config = RM_REGRESSION.resolve(RM_REGRESSION.make_config({}), RewardSummary(num_columns=5))
    assert RM_REGRESSION.needs_of(config).scores == 5
    with pytest.raises(UserError, match=r"num_attributes=3.*names 5"):
        RM_REGRESSION.resolve(RM_REGRESSION.make_config({"num_attributes": 3}), RewardSummary(num_columns=5))


@pytest.mark.parametrize(("objective", "keys"), [(RM, {"margin": 0.2}), (RM_REGRESSION, {})])
def test_finite_differences_agree(objective, keys: dict) -> None:  # type: ignore[no-untyped-def]
    batch, config = make_batch(4, (2, 3)), objective.make_config(keys)

    def loss(scores: Tensor) -> Tensor:
        return objective.loss(dataclasses.replace(batch, scores=scores), config).loss_sum

    assert torch.autograd.gradcheck(loss, batch.scores.clone().requires_grad_(), rtol=1e-6, atol=1e-8)
