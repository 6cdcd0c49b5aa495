"""Draws of single tokens, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_rao.rollout.draws import Sampling, draw, uniforms

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.5, -30.0, 99.0, 99.0]])  # the last two are padding
VOCAB = 6


def drawn(sampling: Sampling, number: int = 20_000) -> np.ndarray:
    """``[VOCAB]`` how often each token was drawn."""
    of = torch.from_numpy(np.concatenate([uniforms(1, step, 2, 3, 100) for step in range(number // 100)]))
    tokens = draw(LOGITS.expand(number, -1), of, sampling, vocab_size=VOCAB)
    return np.bincount(tokens.numpy(), minlength=VOCAB)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=2), [0, 3]),
        (Sampling(top_k=3), [0, 2, 3, 4]),  # two are equally probable
        (Sampling(top_p=0.6), [3]),
        (Sampling(top_p=0.8), [0, 3]),
        (Sampling(temperature=0.5, top_k=4, top_p=0.95), [0, 3]),
    ],
)
def test_twenty_thousand_draws_follow_the_softmax(sampling: Sampling, kept: list[int]) -> None:
    counts = drawn(sampling)
    expected = torch.zeros(VOCAB, dtype=torch.float64)
    expected[kept] = (LOGITS[0, kept].double() / sampling.temperature).softmax(-1)
    assert set(np.flatnonzero(counts)) <= {*kept, 5}
    assert counts[5] == 0  # e^-33: not to be seen
    likely = expected.numpy() > 0
    statistic = ((counts - 20_000 * expected.numpy())[likely] ** 2 / (20_000 * expected.numpy()[likely])).sum()
    # The 99.9 % quantile of chi-squared with 0 to 4 degrees of freedom, 0 of which is certainty.
    assert statistic <= [0.0, 10.83, 13.82, 16.27, 18.47][likely.sum() - 1]


def test_the_most_probable_token_at_temperature_0() -> None:
    assert drawn(Sampling(temperature=0.0), 100).tolist() == [0, 0, 0, 100, 0, 0]


def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, 9.0, 9.0]]).expand(2, -1)
    ends = torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64)
    assert draw(logits, ends, Sampling(), vocab_size=4).tolist() == [1, 2]


def test_numbers_depend_on_all_that_is_sampled() -> None:
    first = uniforms(1, 2, 3, 4, 5)
    assert (uniforms(1, 2, 3, 4, 9)[:5] == first).all()
    for other in ((2, 2, 3, 4), (1, 1, 3, 4), (1, 2, 4, 4), (1, 2, 3, 3)):
        assert (uniforms(*other, 5) != first).all()
