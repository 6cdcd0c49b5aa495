"""Distributions of columns of rewards, and how far they agree with labels and with each other.

Values are kept in unnamed temporary files, eight bytes each, so that quartiles are exact and memory does not grow with
the rows.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nemo_rao.scoring.scorer import Scores

CHUNK = 1 << 18  # values


@dataclass(frozen=True)
class Distribution:
    """Of one column's numbers. ``sd`` is that of the numbers themselves (divided by their count).

    Attributes:
        count, missing: responses with a number, and without.
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
    """Of pairs of responses to one prompt: how many are ordered alike, and how many are a tie in one or both."""

    pairs: int = 0
    alike: int = 0
    ties: int = 0

    def add(self, first: float, second: float) -> None:
        """The signs of two differences."""
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
    """Collects the columns of row after row.

    Args:
        names: of the columns.
        folder: where the temporary files lie; as large as the output in the end, at most.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._values: dict[str, IO[bytes]] = {}
        for name in names:
            self._values[name] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._missing = dict.fromkeys(names, 0)
        self._count = dict.fromkeys(names, 0)
        self.with_labels = {name: Agreement() for name in names}
        self.between = {pair: Agreement() for pair in itertools.combinations(names, 2)}

    def add(self, columns: Mapping[str, Scores], ranked: bool) -> None:
        """One row's scores by column; ``ranked``: the first response is the chosen one."""
        for name, scores in columns.items():
            there = array("d", (score for score in scores if score is not None))
            self._values[name].write(there.tobytes())
            self._count[name] += len(there)
            self._missing[name] += len(scores) - len(there)
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
        count, missing = self._count[name], self._missing[name]
        if not count:
            return Distribution(0, missing)
        self._values[name].flush()
        values = np.memmap(self._values[name], dtype=np.float64, mode="r+", shape=(count,))
        values.sort()  # in the file
        chunks = [values[at : at + CHUNK] for at in range(0, count, CHUNK)]
        mean = math.fsum(float(chunk.sum()) / count for chunk in chunks)
        variance = math.fsum(float(np.square(chunk - mean).sum()) / count for chunk in chunks)
        same = bool(values[0] == values[-1])  # then rounding would leave a deviation where there is none
        return Distribution(
            count,
            missing,
            float(values[0]) if same else mean,
            0.0 if same else math.sqrt(variance),
            *(_quantile(values, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "columns": {name: asdict(one) for name, one in self.distributions().items()},
            "agreement_with_labels": {name: one.as_json() for name, one in self.with_labels.items() if one.pairs},
            "agreement_between": {" / ".join(pair): one.as_json() for pair, one in self.between.items() if one.pairs},
        }

    def close(self) -> None:
        for file in self._values.values():
            file.close()


def _sign(first: float, second: float) -> float:
    return float((first > second) - (first < second))


def _quantile(ordered: np.ndarray, share: float) -> float:
    """Between the two nearest values, linearly, as ``numpy.quantile`` does."""
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (at - below))
