"""Statistics of several seeds: means with intervals, paired differences, win rates, slopes.

Pure functions of arrays. Intervals are two-sided, 95 % unless stated, by Student's t:

    mean                 m ± t_{n-1} s / sqrt(n), s with n - 1 degrees of freedom
    paired difference    the same for the differences between runs of the same seed
    slope                ordinary least squares, t with n - 2 degrees of freedom

A single value has no interval: its half-width is NaN, and reports show the value alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.95
# Penalty of the length coefficient: keeps it finite if length alone separates wins from losses.
_RIDGE = 1e-4


@dataclass(frozen=True)
class Estimate:
    """A mean or a slope, with its interval.

    Attributes:
        value: the estimate; NaN if n is 0.
        half_width: half-width of its interval; NaN with too few values, 0 if all values are equal.
        n: number of values.
    """

    value: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


def student(degrees: int, level: float = LEVEL) -> float:
    """Quantile of Student's t for a two-sided interval; NaN without a degree of freedom."""
    return float(stats.t.ppf((1 + level) / 2, degrees)) if degrees > 0 else math.nan


def mean(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """Return the mean of ``[n]`` values; NaN is ignored."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    n = len(known)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    if n > 1 and np.ptp(known) == 0:  # exact result: the computed mean of three 0.1 is not 0.1
        return Estimate(float(known[0]), 0.0, n)
    error = float(stats.sem(known)) if n > 1 else math.nan
    return Estimate(float(known.mean()), student(n - 1, level) * error, n)


def paired_difference(of: dict[int, float], against: dict[int, float], level: float = LEVEL) -> Estimate:
    """Return the mean of ``of - against`` over the seeds that both have.

    Args:
        of, against: seed -> value.
    """
    seeds = sorted(of.keys() & against.keys())
    return mean([of[seed] - against[seed] for seed in seeds], level)


def slope(x: Sequence[float], y: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the slope of the least-squares line through ``[n]`` points; NaN if all x are equal."""
    of_x, of_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = ~(np.isnan(of_x) | np.isnan(of_y))
    of_x, of_y = of_x[known], of_y[known]
    if len(of_x) < 2 or np.ptp(of_x) == 0:
        return Estimate(math.nan, math.nan, len(of_x))
    found = stats.linregress(of_x, of_y)
    error = float(found.stderr) if len(of_x) > 2 else math.nan
    return Estimate(float(found.slope), student(len(of_x) - 2, level) * error, len(of_x))


# ---------------------------------------------------------------------------------------------------------- win rates


@dataclass(frozen=True)
class Wins:
    """One policy's samples against another's, on the same prompts.

    Attributes:
        win, tie, loss: shares of the compared pairs of samples; they add up to 1.
        rate: win + tie / 2.
        interval: of the rate, over prompts: its pairs of samples are not independent, prompts are.
        length_controlled: the rate at equal lengths (:func:`length_controlled_rate`).
        num_prompts, num_pairs: number of compared prompts and pairs.
    """

    win: float
    tie: float
    loss: float
    rate: float
    interval: Estimate
    length_controlled: float
    num_prompts: int
    num_pairs: int


def wins(
    scores: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    other_lengths: Sequence[Sequence[float]],
) -> Wins:
    """Compare every sample of a prompt with every one of the other policy's samples of it.

    Args:
        scores, other: for each prompt the scores of its samples, NaN for a sample without a score, which is ignored.
            The prompts are the same, in the same order; the numbers of samples may differ.
        lengths, other_lengths: of these samples, in any one unit.

    Raises:
        ValueError: the numbers of prompts differ.
    """
    outcomes, differences = [], []
    for of, against, length, other_length in zip(scores, other, lengths, other_lengths, strict=True):
        one, two = np.asarray(of, dtype=np.float64)[:, None], np.asarray(against, dtype=np.float64)[None, :]
        outcome = np.where(np.isnan(one) | np.isnan(two), np.nan, (np.sign(one - two) + 1) / 2)
        longer = np.asarray(length, dtype=np.float64)[:, None] - np.asarray(other_length, dtype=np.float64)[None, :]
        known = ~np.isnan(outcome)
        if known.any():
            outcomes.append(outcome[known])
            differences.append(longer[known])
    if not outcomes:
        nan = math.nan
        return Wins(nan, nan, nan, nan, Estimate(nan, nan, 0), nan, 0, 0)
    all_outcomes = np.concatenate(outcomes)
    # Each prompt counts once, regardless of how many of its samples have a score.
    weights = np.concatenate([np.full(len(one), 1 / len(one)) for one in outcomes]) / len(outcomes)
    win, tie, loss = (float(weights[all_outcomes == value].sum()) for value in (1.0, 0.5, 0.0))
    return Wins(
        win,
        tie,
        loss,
        rate=win + tie / 2,
        interval=mean([one.mean() for one in outcomes]),
        length_controlled=length_controlled_rate(all_outcomes, np.concatenate(differences), weights),
        num_prompts=len(outcomes),
        num_pairs=len(all_outcomes),
    )


def length_controlled_rate(
    outcomes: np.ndarray, length_differences: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """Return the win rate that a logistic regression predicts for answers of equal length, as in AlpacaEval 2.

        P(win) = sigmoid(theta + phi tanh(d / std(d)))        at d = 0: sigmoid(theta)

    (Dubois et al. 2024, arXiv:2404.04475, Eq. 2.) Their third term, the difficulty of an instruction, is fitted over a
    leaderboard of models and is omitted here: two policies do not identify it.

    Args:
        outcomes: ``[n]``, 1 for a win, 0.5 for a tie, 0 for a loss.
        length_differences: ``[n]``, own length minus the other's.
        weights: ``[n]``; ``None``: equal weights.
    """
    outcomes, difference = np.asarray(outcomes, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    weights = np.full(len(outcomes), 1 / len(outcomes)) if weights is None else weights / weights.sum()
    rate = float(weights @ outcomes)
    spread = float(np.sqrt(weights @ (difference - weights @ difference) ** 2))
    if spread == 0 or rate in (0.0, 1.0):  # equal lengths, or nothing to explain
        return rate
    longer = np.tanh(difference / spread)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        theta, phi = parameters
        logits = theta + phi * longer
        # -y log p - (1 - y) log(1 - p), without overflow
        value = weights @ (np.logaddexp(0, logits) - outcomes * logits) + _RIDGE / 2 * phi**2
        error = weights * (special.expit(logits) - outcomes)
        return float(value), np.array([error.sum(), error @ longer + _RIDGE * phi])

    found = optimize.minimize(loss, np.array([special.logit(rate), 0.0]), jac=True, method="BFGS")
    return float(special.expit(found.x[0]))
