"""Histograms with round bin edges, for text and SVG charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_LARGEST_LEVEL, _LEAST_STEP = 1e6, 1e-6
_MOST_LEVELS = 12  # up to this many distinct values, such as grades 1 to 10, get a bar each


@dataclass(frozen=True)
class Histogram:
    """Bins of equal width, shared by all series.

    Attributes:
        edges: ``[bins + 1]``, ascending.
        counts: series -> ``[bins]``. Values outside the edges are counted in the first and the last bin.
        is_cut: whether there are values below the first and above the last edge.
        levels: whether each bin stands for a single value, its center.
        mark: value to mark, such as model.seq_length; ``None``: none.
    """

    edges: np.ndarray
    counts: Mapping[str, np.ndarray]
    is_cut: tuple[bool, bool]
    levels: bool
    mark: float | None = None

    @property
    def totals(self) -> np.ndarray:
        """``[bins]``, counts summed over series."""
        return np.sum(list(self.counts.values()), axis=0)

    def bins_up_to_mark(self) -> int:
        """Number of bins that begin below the mark; all if there is none."""
        return len(self.edges) - 1 if self.mark is None else int(np.sum(self.edges[:-1] < self.mark))

    def label(self, bin: int) -> str:
        """Range of a bin: "128 to 160", "3", "above 4,096"."""
        low, high = number(self.edges[bin]), number(self.edges[bin + 1])
        if self.levels:
            return number((self.edges[bin] + self.edges[bin + 1]) / 2)
        if bin == 0 and self.is_cut[0]:
            return f"below {high}"
        if bin == len(self.edges) - 2 and self.is_cut[1]:
            return f"above {low}"
        return f"{low} to {high}"


def histogram(
    series: Mapping[str, np.ndarray], *, bins: int = 28, mark: float | None = None, from_zero: bool = False
) -> Histogram | None:
    """Compute the histogram of several series; ``None`` if they have no values.

    Args:
        series: name -> values; NaN is left out.
        bins: approximate number of bins.
        mark: value to mark. If values come near it, the bins extend to it, and at most to twice the mark.
        from_zero: set the first edge to 0.
    """
    known = {name: values[np.isfinite(values)] for name, values in series.items()}
    everything = np.concatenate([np.empty(0), *known.values()])
    if not len(everything):
        return None
    distinct = np.unique(everything) if len(everything) <= 1_000_000 else np.unique(everything[::97])
    if not from_zero and len(distinct) <= _MOST_LEVELS and (step := _even_step(distinct)):
        steps = round((distinct[-1] - distinct[0]) / step) + 1
        edges = distinct[0] + step * (np.arange(steps + 1) - 0.5)
        return _counted(known, edges, levels=True, mark=mark)
    low, high = _range(everything)
    if from_zero:
        low = 0.0
    if mark is not None and high >= mark / 2:
        high = min(max(high, 1.1 * mark), 2 * mark)
    width = _round_width(high / bins - low / bins)
    if from_zero:
        width = max(width, 1.0)
    first = math.floor(low / width) * width
    count = max(1, math.ceil((high - first) / width * (1 - 1e-9)))
    return _counted(known, first + width * np.arange(count + 1), levels=False, mark=mark)


def _counted(known: Mapping[str, np.ndarray], edges: np.ndarray, *, levels: bool, mark: float | None) -> Histogram:
    counts, low, high = {}, False, False
    for name, values in known.items():
        at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        counts[name] = np.bincount(at, minlength=len(edges) - 1)
        low, high = low or bool((values < edges[0]).any()), high or bool((values > edges[-1]).any())
    return Histogram(edges, counts, (low, high), levels, mark)


def _even_step(distinct: np.ndarray) -> float:
    """Step of which all gaps between the values are small multiples; 0 if there is none."""
    if np.abs(distinct).max() > _LARGEST_LEVEL:
        return 0.0
    if len(distinct) == 1:
        return 1.0
    gaps = np.diff(distinct)
    step = float(gaps.min())
    if step < _LEAST_STEP:
        return 0.0
    multiples = gaps / step
    even = np.allclose(multiples, np.round(multiples), atol=1e-6) and multiples.sum() < 2 * _MOST_LEVELS
    return step if even else 0.0


def _range(values: np.ndarray) -> tuple[float, float]:
    """Range of nearly all values, so that outliers do not squeeze the others into one bin."""
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = np.percentile(values, (0.5, 99.5)).tolist()
    spread = inner_high - inner_low
    if 0 < spread < np.inf:
        low, high = max(low, inner_low - spread), min(high, inner_high + spread)
    least = max(1e-9, 1e-6 * abs(low), 1e-6 * abs(high))  # so that edges are distinct
    return (low, high) if high / 2 - low / 2 > least else (low - 10 * least, high + 10 * least)


def _round_width(width: float) -> float:
    """The next 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= width * (1 - 1e-9))


def ticks(histogram: Histogram, count: int = 5) -> list[float]:
    """About ``count`` round numbers between the first and the last edge, or with ``levels``, centers of bins."""
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    if histogram.levels:
        centers = ((histogram.edges[:-1] + histogram.edges[1:]) / 2).tolist()
        return centers[:: -(-len(centers) // 8)]
    step = _round_width((high - low) / count)
    first = math.ceil(low / step - 1e-9)
    return [step * at for at in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number with up to four significant digits: "1,234", "0.25", "-3.1e-05"."""
    value = float(value)
    if abs(value) < 1e-12:
        return "0"
    if value == round(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"
