"""Distributions of columns of rewards, and how often they agree with labels and with each other.

Quartiles are exact, so all values are kept, in eight bytes each: 100 million responses take 0.8 GB a column, and as
much again for one column at a time while its quantiles are computed.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_rao.scoring.scorer import Scores


@dataclass(frozen=True)
class Distribution:
    """The distribution of one column. ``sd`` is that of the population (divided by ``count``).

    Attributes:
        count, missing: number of responses with a value, and without.
    """

    count: int
    missing: int
    mean: float | None = None
    sd: float | None = None
    min: float | None = None
    q1: float | None = None
    median: float | None = None
    q3: float | None = None
    max: float | None = None


@dataclass
class Agreement:
    """Pairs of responses to one prompt: how many are ordered alike, and how many are a tie in one or both."""

    pairs: int = 0
    alike: int = 0
    ties: int = 0

    def add(self, first: float, second: float) -> None:
        """Count a pair, given the signs of its two differences."""
        self.pairs += 1
        self.ties += first == 0 or second == 0
        self.alike += first == second

    def as_json(self) -> dict[str, float | int | None]:
        shares = {
            "agreement": self.alike / self.pairs if self.pairs else None,
            "ties": self.ties / self.pairs if self.pairs else None,
        }
        return {"pairs": self.pairs} | shares


class Collector:
    """Collects columns row by row.

    Args:
        names: the columns.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._values = {name: array("d") for name in names}
        self._missing = dict.fromkeys(names, 0)
        self.with_labels = {name: Agreement() for name in names}
        self.between = {pair: Agreement() for pair in itertools.combinations(names, 2)}

    def add(self, columns: Mapping[str, Scores], ranked: bool) -> None:
        """Add one row's scores by column; ``ranked``: the first response is the chosen one."""
        for name, scores in columns.items():
            present = [score for score in scores if score is not None]
            self._values[name].extend(present)
            self._missing[name] += len(scores) - len(present)
            if ranked:
                for other in scores[1:]:
                    if scores[0] is not None and other is not None:
                        self.with_labels[name].add(1.0, _sign(scores[0], other))
        for (one, two), agreement in self.between.items():
            for i, j in itertools.combinations(range(len(columns[one])), 2):
                (a, b), (c, d) = (columns[one][i], columns[one][j]), (columns[two][i], columns[two][j])
                if a is not None and b is not None and c is not None and d is not None:
                    agreement.add(_sign(a, b), _sign(c, d))

    def distributions(self) -> dict[str, Distribution]:
        return {name: self._distribution(name) for name in self._values}

    def _distribution(self, name: str) -> Distribution:
        values, missing = np.frombuffer(self._values[name]), self._missing[name]
        if not len(values):
            return Distribution(0, missing)
        quantiles = np.quantile(values, (0.0, 0.25, 0.5, 0.75, 1.0))
        low, high = float(quantiles[0]), float(quantiles[-1])
        # Of equal values, rounding would leave a deviation.
        mean, sd = (low, 0.0) if low == high else (float(values.mean()), float(values.std()))
        return Distribution(len(values), missing, mean, sd, *map(float, quantiles))

    def as_json(self) -> dict[str, Any]:
        return {
            "columns": {name: asdict(one) for name, one in self.distributions().items()},
            "agreement_with_labels": {name: one.as_json() for name, one in self.with_labels.items() if one.pairs},
            "agreement_between": {" / ".join(pair): one.as_json() for pair, one in self.between.items() if one.pairs},
        }


def _sign(first: float, second: float) -> float:
    return float((first > second) - (first < second))
