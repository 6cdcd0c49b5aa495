"""Histograms as SVG, with CSS classes of the page's style sheet, so that they follow light and dark mode."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from nemo_rao.show.histogram import Histogram, number, ticks

_WIDTH, _HEIGHT = 400, 190  # units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 392, 22, 162
_LEAST_HEIGHT = 2.0  # of a bar with a nonzero count


def svg(histogram: Histogram, *, classes: Mapping[str, str], stacked: bool, mark_name: str, label: str) -> str:
    """Draw a histogram.

    Args:
        classes: series -> CSS class of its bars.
        stacked: stack the bars of the series; otherwise draw them side by side.
        mark_name: name of the histogram's mark.
        label: text for screen readers.
    """
    counts = histogram.counts
    highest = int(max(histogram.totals.max() if stacked else max(series.max() for series in counts.values()), 1))
    top = _round_up(highest)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in sorted({0, top // 2, top} if top > 1 else {0, top}):
        y = _y(value, top)
        parts.append(
            f'<line class="{"axis" if value == 0 else "grid"}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    parts += _stacked(histogram, classes, top) if stacked else _side_by_side(histogram, classes, top)
    parts += _ticks(histogram)
    parts += _mark(histogram, mark_name)
    return "".join([*parts, "</svg>"])


def share(kept: int, total: int) -> str:
    """Draw a bar with the fraction of rows that are kept."""
    width = 100 * kept / max(total, 1)
    return (
        f'<svg class="share" viewBox="0 0 100 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{kept:,} of {total:,} rows kept"><rect class="dropped" width="100" height="1"/>'
        f'<rect class="kept" width="{width:.3f}" height="1"/></svg>'
    )


def _stacked(histogram: Histogram, classes: Mapping[str, str], top: int) -> list[str]:
    parts = []
    for bin in range(len(histogram.edges) - 1):
        base = float(_BOTTOM)
        for name, series in histogram.counts.items():
            if count := int(series[bin]):
                height = max(_LEAST_HEIGHT, _BOTTOM - _y(count, top))
                parts.append(_bar(histogram, bin, 0.0, 1.0, base, height, classes[name], name, count))
                base -= height
    return parts


def _side_by_side(histogram: Histogram, classes: Mapping[str, str], top: int) -> list[str]:
    parts, share_of = [], 1 / len(histogram.counts)
    for at, (name, series) in enumerate(histogram.counts.items()):
        for bin, count in enumerate(series.tolist()):
            if count:
                height = max(_LEAST_HEIGHT, _BOTTOM - _y(count, top))
                parts.append(_bar(histogram, bin, at * share_of, share_of, _BOTTOM, height, classes[name], name, count))
    return parts


def _bar(
    histogram: Histogram,
    bin: int,
    start: float,
    part: float,
    base: float,
    height: float,
    kind: str,
    name: str,
    count: int,
) -> str:
    """Draw one bar; ``start`` and ``part`` are fractions of the bin's width."""
    width = (_RIGHT - _LEFT) / (len(histogram.edges) - 1)
    gap = min(1.0, width / 8)
    x = _LEFT + width * (bin + start) + gap / 2
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{base - height:.2f}" width="{max(width * part - gap, 0.5):.2f}" '
        f'height="{height:.2f}"><title>{escape(histogram.label(bin))}: {count:,} {escape(name)}</title></rect>'
    )


def _ticks(histogram: Histogram) -> list[str]:
    low, high = histogram.edges[0], histogram.edges[-1]
    parts = []
    for value in ticks(histogram):
        x = _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)
        text = number(value)
        outside = x + 3.5 * len(text) > _WIDTH
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_BOTTOM}" y2="{_BOTTOM + 4}"/>')
        parts.append(
            f'<text x="{_WIDTH if outside else x:.1f}" y="{_BOTTOM + 18}" '
            f'text-anchor="{"end" if outside else "middle"}">{text}</text>'
        )
    return parts


def _mark(histogram: Histogram, name: str) -> list[str]:
    """Draw the mark as a line, or as an arrow towards it if it is outside."""
    if histogram.mark is None:
        return []
    text, low, high = f"{name} {number(histogram.mark)}", histogram.edges[0], histogram.edges[-1]
    if histogram.mark > high:
        return [f'<text class="mark" x="{_RIGHT}" y="{_TOP - 9}" text-anchor="end">{escape(text)} →</text>']
    x = _LEFT + (histogram.mark - low) / (high - low) * (_RIGHT - _LEFT)
    anchor, shift = ("end", -4) if x > (_LEFT + _RIGHT) / 2 else ("start", 4)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 18}" y2="{_BOTTOM}"/>',
        f'<text class="mark" x="{x + shift:.1f}" y="{_TOP - 9}" text-anchor="{anchor}">{escape(text)}</text>',
    ]


def _y(count: float, top: int) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * count / top


def _round_up(count: int) -> int:
    """Round up to an even number with two significant digits."""
    power = 10 ** max(0, len(str(count)) - 2)
    steps = int(np.ceil(count / power))
    return (steps + steps % 2) * power if count > 1 else 1


def _short(count: int) -> str:
    return f"{count / 1e6:g}M" if count >= 1_000_000 else f"{count / 1e3:g}k" if count >= 10_000 else f"{count:,}"
