"""Which of a prompt's responses are pairs, by labels and by rewards."""

import dataclasses

import pytest
import torch

from nemo_rao.objectives.dpo import DPO, DPOConfig
from nemo_rao.objectives.pairs import all_pairs, best_and_worst, select_best

from .batches import make_batch

NAN = float("nan")


def batch_of(rewards: list[list[float]], ranked: bool, counts: tuple[int, ...]):  # type: ignore[no-untyped-def]
    batch = make_batch(num_responses=counts, ranked=ranked)
    return dataclasses.replace(batch, rewards=torch.tensor(rewards, dtype=torch.float64))


def pairs(batch) -> list[list[tuple[int, int]]]:  # type: ignore[no-untyped-def]
    """For each prompt, (better, worse)."""
    return [[(int(i), int(j)) for i, j in valid.nonzero()] for valid in all_pairs(batch).valid]


def test_by_rewards_the_higher_one_is_better() -> None:
    batch = batch_of([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]], False, (3, 2))
    assert pairs(batch) == [[(1, 0), (1, 2), (2, 0)], [(0, 1)]]


def test_by_labels_the_earlier_one_is_better_whatever_the_rewards() -> None:
    batch = batch_of([[1.0, 3.0, 2.0], [NAN, NAN, 0.0]], True, (3, 2))
    assert pairs(batch) == [[(0, 1), (0, 2), (1, 2)], [(0, 1)]]


def test_equal_rewards_are_no_pair_and_a_prompt_without_pairs_does_not_count() -> None:
    batch = batch_of([[1.0, 1.0, 0.0], [5.0, 5.0, 4.0]], False, (2, 3))
    assert pairs(batch) == [[], [(0, 2), (1, 2)]]
    output = DPO.loss(batch, DPOConfig())
    assert output.num_prompts == 1
    assert {float(pair[1]) for pair in output.metrics.values()} == {1}


def test_labels_make_a_pair_of_equal_rewards() -> None:
    assert pairs(batch_of([[1.0, 1.0]], True, (2,))) == [[(0, 1)]]


@pytest.mark.parametrize("rewards", [[NAN, NAN, NAN], [1.0, NAN, 2.0]])
def test_without_labels_and_with_a_reward_missing_there_is_no_pair(rewards: list[float]) -> None:
    batch = batch_of([rewards], False, (3,))
    assert pairs(batch) == [[]]
    output = DPO.loss(batch, DPOConfig())
    assert output.loss_sum == 0 and output.num_prompts == 0


def test_the_loss_is_the_mean_over_a_prompts_pairs() -> None:
    """Three responses in order are the pairs (0, 1), (0, 2), (1, 2)."""
    whole = make_batch(num_responses=(3,), ranked=True)

    def loss_of(*responses: int) -> float:
        kept = torch.isin(torch.arange(3), torch.tensor(responses))
        return float(DPO.loss(dataclasses.replace(whole, valid=kept[None]), DPOConfig()).loss_sum)

    expected = (loss_of(0, 1) + loss_of(0, 2) + loss_of(1, 2)) / 3
    assert float(DPO.loss(whole, DPOConfig()).loss_sum) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("rewards", "ranked", "best", "worst"),
    [([1.0, 3.0, 2.0], False, 1, 0), ([1.0, 3.0, 2.0], True, 0, 2), ([3.0, 3.0, 1.0], False, 0, 2)],
)
def test_metrics_compare_the_best_with_the_worst(rewards: list[float], ranked: bool, best: int, worst: int) -> None:
    batch = batch_of([rewards], ranked, (3,))
    pair = best_and_worst(batch)
    assert (pair.chosen.tolist(), pair.rejected.tolist(), pair.valid.tolist()) == ([best], [worst], [True])
    assert select_best(batch)[0].tolist() == [best]


def test_one_response_is_best_but_no_pair() -> None:
    for ranked in (False, True):
        batch = batch_of([[1.0]], ranked, (1,))
        assert select_best(batch)[0].tolist() == [0] and select_best(batch)[1].tolist() == [True]
        assert not best_and_worst(batch).valid.any() and not all_pairs(batch).valid.any()
