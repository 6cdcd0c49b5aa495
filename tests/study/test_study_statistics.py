"""The statistics of a study, against values worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

from nemo_rao.study.statistics import Estimate, length_controlled_rate, mean, paired_difference, slope, student, wins


def test_students_quantiles_are_those_of_the_tables() -> None:
    assert [round(student(n), 3) for n in (1, 2, 4, 9)] == [12.706, 4.303, 2.776, 2.262]
    assert math.isnan(student(0))


def test_a_mean_has_students_interval() -> None:
    found = mean([1.0, 2.0, 3.0, math.nan])  # s = 1
    assert (found.value, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean([0.1] * 3) == Estimate(0.1, 0.0, 3), "equal values have no spread, to the last bit"
    assert mean([5.0]).value == 5.0 and math.isnan(mean([5.0]).half_width)
    assert math.isnan(mean([]).value)


def test_differences_are_those_of_the_same_seeds() -> None:
    """The seeds' own spread, here 100, has no part in the interval."""
    found = paired_difference({1: 101.0, 2: 202.0, 3: 303.0, 9: 0.0}, {3: 300.0, 2: 200.0, 1: 100.0, 4: 7.0})
    assert (found.value, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_a_slope_has_the_interval_of_least_squares() -> None:
    """R: summary(lm(c(2.1, 3.9, 6.2, 7.8) ~ c(1, 2, 3, 4))): 1.94, standard error 0.09055."""
    found = slope([1, 2, 3, 4], [2.1, 3.9, 6.2, 7.8])
    assert found.value == pytest.approx(1.94)
    assert found.half_width == pytest.approx(4.302653 * 0.09055385, rel=1e-5)
    assert math.isnan(slope([1, 1, 1], [1, 2, 3]).value)


def test_wins_count_ties_by_half_and_each_prompt_once() -> None:
    """The first prompt has four pairs, win win tie loss; the second one pair, a loss; the third no score."""
    found = wins([[2, 1], [0], [math.nan]], [[1, 1.5], [1], [1]], [[1, 1], [1], [1]], [[1, 1], [1], [1]])
    assert (found.win, found.tie, found.loss) == (pytest.approx(0.25), pytest.approx(0.125), pytest.approx(0.625))
    assert found.rate == pytest.approx(0.3125) == found.interval.value
    assert (found.num_prompts, found.num_pairs) == (2, 5)
    assert found.length_controlled == pytest.approx(0.3125), "equal lengths leave nothing to control for"


def test_the_length_controlled_rate_recovers_the_rate_at_equal_length() -> None:
    """Outcomes made with theta = 0.4 and phi = 1.5: expected shares, so that no chance is in it."""
    difference = np.linspace(-10, 40, 2001)
    true = special.expit(0.4 + 1.5 * np.tanh(difference / difference.std()))
    found = length_controlled_rate(true, difference)
    assert found == pytest.approx(special.expit(0.4), abs=2e-3)
    assert true.mean() > found + 0.1, "the raw rate rewards length"


def test_length_that_decides_everything_keeps_the_fit_finite() -> None:
    outcomes, difference = np.array([1.0, 1.0, 0.0, 0.0]), np.array([5.0, 4.0, -4.0, -5.0])
    assert length_controlled_rate(outcomes, difference) == pytest.approx(0.5, abs=1e-6)
    assert length_controlled_rate(np.ones(4), difference) == 1.0
