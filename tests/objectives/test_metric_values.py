"""Metrics of single objectives, and rare batches, against formulas in plain Python."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch
from nemo_rao.objectives.groupwise import KIMI, QRPO, RPO_PARTITION, reward_quantiles
from nemo_rao.objectives.grpo import GRPO
from nemo_rao.objectives.pointwise import KTO
from nemo_rao.objectives.reward_model import RM, RM_REGRESSION
from nemo_rao.objectives.rpo import RPO
from nemo_rao.objectives.sft import SFT

from .batches import Entry, loss_and_gradients, make_batch, prompts_of, sigmoid, with_tokens

NAN = float("nan")


def of(metrics: Mapping[str, Tensor], name: str) -> float:
    """The metric: its sum / its count."""
    total, count = metrics[name].tolist()
    return total / count


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_rpos_target_error_is_the_mean_gap_between_differences_of_pairs() -> None:
    batch, beta, eta = make_batch(), 0.2, 0.5
    per_prompt = []
    for entries in prompts_of(batch):
        errors = [beta * entry.rho - eta * entry.reward for entry in entries]
        gaps = [abs(one - other) for one, other in itertools.combinations(errors, 2)]
        per_prompt += [mean(gaps)] if gaps else []
    output = RPO.loss(batch, RPO.make_config({"beta": beta, "eta": eta}))
    assert len(per_prompt) == 3  # one prompt has a single response
    assert of(output.metrics, "rpo/target_error") == pytest.approx(mean(per_prompt), rel=1e-12)


def test_rpo_partitions_target_error_is_in_units_of_the_reward() -> None:
    batch, tau = make_batch(), 2.0
    per_prompt = []
    for entries in prompts_of(batch):
        terms = [(entry.logp - entry.rho) / entry.length + entry.reward / tau for entry in entries]
        value = tau * math.log(math.fsum(map(math.exp, terms)))
        errors = [abs(tau * entry.rho / entry.length - (entry.reward - value)) for entry in entries]
        per_prompt.append(mean(errors))
    output = RPO_PARTITION.loss(batch, RPO_PARTITION.make_config({"tau": tau}))
    assert of(output.metrics, "rpo_partition/target_error") == pytest.approx(mean(per_prompt), rel=1e-12)


def test_kimis_target_error_leaves_out_single_responses() -> None:
    batch, tau = make_batch(), 0.3
    per_prompt = []
    for entries in prompts_of(batch):
        if len(entries) > 1:
            center = mean([entry.reward for entry in entries])
            per_prompt.append(mean([abs(entry.reward - center - tau * entry.rho) for entry in entries]))
    output = KIMI.loss(batch, KIMI.make_config({"tau": tau}))
    assert of(output.metrics, "kimi/target_error") == pytest.approx(mean(per_prompt), rel=1e-12)


@pytest.mark.parametrize("num_reference", [1, 3, 6])
def test_quantiles_refer_to_the_rows_reference_rewards_however_many(num_reference: int) -> None:
    """A row has fewer or more reference rewards than responses; the last row has none and is compared with its own."""
    batch = make_batch()
    given = torch.linspace(-2, 8, 4 * num_reference, dtype=torch.float64).view(num_reference, 4).T.contiguous()
    given[-1] = NAN
    found = reward_quantiles(dataclasses.replace(batch, reference_rewards=given))
    for row, entries in enumerate(prompts_of(batch)):
        samples = given[row].tolist() if row < 3 else [entry.reward for entry in entries]
        for entry in entries:
            expected = mean([float(sample <= entry.reward) for sample in samples])
            assert found[row, entry.column] == pytest.approx(expected, rel=1e-12), (row, entry)


def test_qrpos_target_error_is_the_distance_of_quantiles() -> None:
    batch, beta = make_batch(), 0.5
    log_z = math.log(beta) + 1 / beta
    per_prompt = []
    for entries in prompts_of(batch):
        rewards = [entry.reward for entry in entries]
        quantiles = [mean([float(other <= entry.reward) for other in rewards]) for entry in entries]
        errors = [abs(q - beta * (log_z + entry.rho)) for q, entry in zip(quantiles, entries, strict=True)]
        per_prompt.append(mean(errors))
    output = QRPO.loss(batch, QRPO.make_config({"beta": beta}))
    assert of(output.metrics, "qrpo/target_error") == pytest.approx(mean(per_prompt), rel=1e-12)


def test_error_of_regression_is_the_mean_over_known_attributes() -> None:
    batch = make_batch(num_responses=(2, 1))
    scores = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [9.0, 9.0, 9.0]]]).double()
    labels = torch.tensor([[[2.0, 4.0, NAN], [3.0, -100.0, NAN]], [[1.5, 1.5, 2.5], [0.0, 0.0, 0.0]]]).double()
    output = RM_REGRESSION.loss(
        dataclasses.replace(batch, scores=scores, reward_ensemble=labels), RM_REGRESSION.make_config({})
    )
    # First prompt: |1 - 2| and |2 - 4|, and |0 - 3|; second: 0.5, 0.5 and 1.5.
    expected = mean([mean([mean([1, 2]), 3]), mean([0.5, 0.5, 1.5])])
    assert of(output.metrics, "rm/error") == pytest.approx(expected, rel=1e-12)


def test_equal_scores_are_not_right_and_a_small_lead_is() -> None:
    batch = make_batch(0, (2, 2, 2), ranked=True)
    scores = torch.tensor([[[1.0], [1.0]], [[0.5], [0.0]], [[0.0], [0.5]]]).double()
    output = RM.loss(dataclasses.replace(batch, scores=scores), RM.make_config({}))
    assert output.metrics["rm/accuracy"].tolist() == [1, 3]


def kto_expected(prompts: list[list[tuple[Entry, bool]]], batch: ObjectiveBatch, beta: float) -> dict[str, float]:
    """Loss and metrics of responses, each with whether it is desirable; desirable_weight = undesirable_weight = 1."""
    assert batch.kl_estimate is not None
    z0 = max(0.0, float(batch.kl_estimate))
    losses: list[float] = []
    good: list[float] = []
    bad: list[float] = []
    for entries in prompts:
        terms = [1 - sigmoid(beta * ((entry.rho - z0) if one else (z0 - entry.rho))) for entry, one in entries]
        losses += [mean(terms)] if terms else []
        for kind, found in ((True, good), (False, bad)):
            rewards = [beta * entry.rho for entry, one in entries if one is kind]
            found += [mean(rewards)] if rewards else []
    return {"loss": mean(losses), "kto/reward_desirable": mean(good), "kto/reward_undesirable": mean(bad)}


@pytest.mark.parametrize("threshold", [None, 3.0])
def test_kto_leaves_out_responses_without_a_reward(threshold: float | None) -> None:
    """Labels, or rewards with a threshold; of each prompt with several responses, the second has no reward."""
    batch, beta = make_batch(), 0.1
    rewards = batch.rewards.clone() if threshold is not None else (batch.rewards > 3).double()
    rewards[:, 1] = NAN
    batch = with_tokens(dataclasses.replace(batch, rewards=rewards))
    prompts = [
        [(entry, entry.reward > (0.5 if threshold is None else threshold)) for entry in entries if entry.column != 1]
        for entries in prompts_of(batch)
    ]
    assert {one for entries in prompts for _, one in entries} == {True, False}
    output = KTO.loss(batch, KTO.make_config({"beta": beta, "threshold": threshold}))
    expected = kto_expected(prompts, batch, beta)
    assert float(output.loss_sum / output.num_prompts) == pytest.approx(expected.pop("loss"), rel=1e-12)
    for name, value in expected.items():
        assert of(output.metrics, name) == pytest.approx(value, rel=1e-12), name


def test_kto_takes_ranked_responses_without_rewards() -> None:
    """Labels of pairs say which is desirable, the first; no reward is needed."""
    batch, beta = make_batch(0, (2, 2), ranked=True), 0.1
    batch = with_tokens(dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, NAN)))
    prompts = [[(entry, entry.column == 0) for entry in entries] for entries in prompts_of(batch)]
    output = KTO.loss(batch, KTO.make_config({"beta": beta}))
    expected = kto_expected(prompts, batch, beta)
    assert float(output.loss_sum / output.num_prompts) == pytest.approx(expected["loss"], rel=1e-12)


def test_a_response_or_prompt_of_one_token_is_divided_by_one() -> None:
    batch = make_batch(num_responses=(1,))
    batch = dataclasses.replace(
        batch, lengths=torch.ones_like(batch.lengths), prompt_lengths=torch.ones_like(batch.lengths)
    )
    output, *_ = loss_and_gradients(SFT, batch, SFT.make_config({"prompt_weight": 0.5}))
    expected = -float(batch.response_logps[0, 0]) - 0.5 * float(batch.prompt_logps[0, 0])
    assert output.loss_sum.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", ["sequence", "constant"])
def test_grpo_counts_neither_empty_responses_nor_those_without_a_reward(normalize: str) -> None:
    batch = make_batch(num_responses=(4, 3))
    rewards = batch.rewards.clone()
    rewards[1, 2] = NAN
    batch = with_tokens(dataclasses.replace(batch, rewards=rewards))
    assert batch.tokens is not None
    mask = batch.tokens.mask.clone()
    mask[0, 0] = False
    batch = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, mask=mask))
    output = GRPO.loss(batch, GRPO.make_config({"normalize": normalize}))
    assert output.num_prompts == 3 + 2
