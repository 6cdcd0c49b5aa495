"""Figures of a report as SVG text: curves with bands, intervals, regressions. Pure functions of numbers.

The same numbers give the same text: no date, no random identifiers. Letters are drawn as paths, so that pages look the
same everywhere.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_rao.study.statistics import Estimate

Series = tuple[Sequence[float], Sequence[float]]  # steps, values
_BLUE = "#1f5fa8"
_WIDTH = 11.0  # inches of a figure; a page shows it 1,100 pixels wide
_TITLE_WIDTH = 40  # characters of a title over a third of the figure
_STYLE = {
    "svg.fonttype": "path",
    "text.parse_math": False,  # "$" in a label is a dollar sign
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Panel:
    """One metric over steps.

    Attributes:
        title, unit: labels of the axis.
        lines: label -> one series per seed.
        dashed: labels that are drawn dashed.
    """

    title: str
    unit: str
    lines: Mapping[str, Sequence[Series]]
    dashed: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Bar:
    """One row of a figure of intervals: an estimate and the values of the seeds."""

    label: str
    estimate: Estimate
    points: Sequence[float]


def curves(panels: Sequence[Panel], name: str, *, shares_legend: bool = True) -> str:
    """Draw panels, three per row. A line is the mean over seeds at their common steps; its band spans the seeds.

    Args:
        shares_legend: draw one legend below all panels, which have the same lines, instead of one below each panel.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    shares_legend = shares_legend and len(labels) > 1
    num_columns = legend_columns(labels)
    legend_height = 0.25 + 0.25 * math.ceil(len(labels) / num_columns)
    height = 2.9 * rows + (legend_height if shares_legend else 0.6 * rows if len(labels) > 1 else 0)
    with _figure(name, (_WIDTH, height)) as (figure, save):
        colors = _colors(labels)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=False):
            for label, of_seeds in panel.lines.items():
                steps, values = _aligned(of_seeds)
                if not len(steps):
                    continue
                style = "--" if label in panel.dashed else "-"
                marker = "o" if len(steps) < 12 else None
                (line,) = axis.plot(
                    steps, values.mean(axis=0), style, color=colors[label], label=label, marker=marker, markersize=3
                )
                if len(values) > 1:
                    low, high = values.min(axis=0), values.max(axis=0)
                    axis.fill_between(steps, low, high, alpha=0.18, color=colors[label], linewidth=0)
                handles.setdefault(label, line)
            axis.set_title(textwrap.fill(panel.title, _TITLE_WIDTH))
            axis.set_xlabel("step")
            axis.set_ylabel(panel.unit)
            if not shares_legend and len(panel.lines) > 1 and axis.has_data():
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)  # below: never covers a line
        for axis in list(figure.axes)[len(panels) :]:
            axis.set_visible(False)
        if shares_legend:
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=min(num_columns, len(handles))
            )
        return save()


def legend_columns(labels: Sequence[str]) -> int:
    """Return how many columns of a legend fit; a character takes up to 0.085 inches, a line with its gaps 0.6."""
    longest = max(map(len, labels), default=0)
    return max(1, min(6, len(labels), int(_WIDTH / (0.6 + 0.085 * longest))))


def intervals(groups: Mapping[str, Sequence[Bar]], name: str, *, mark: float | None = None) -> str:
    """Draw a panel for each group, three per row, with the same rows: an estimate's interval, and a dot per seed.

    Args:
        groups: title -> its bars, with the same labels in every group.
        mark: a reference value, drawn as a line.
    """
    columns = min(3, len(groups))
    rows, num_bars = math.ceil(len(groups) / columns), max(len(bars) for bars in groups.values())
    width = _WIDTH * (1 if columns > 1 else 0.7)
    with _figure(name, (width, rows * (0.85 + 0.36 * num_bars))) as (figure, save):
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
        for axis, (title, bars) in zip(axes, groups.items(), strict=False):
            for row, bar in enumerate(bars):
                height = len(bars) - 1 - row
                axis.scatter(bar.points, [height + 0.2] * len(bar.points), s=12, color="0.5", zorder=2, linewidths=0)
                if math.isfinite(bar.estimate.value):
                    error = None if math.isnan(bar.estimate.half_width) else bar.estimate.half_width
                    axis.errorbar(bar.estimate.value, height, xerr=error, fmt="o", color=_BLUE, capsize=4, zorder=3)
            if mark is not None:
                axis.axvline(mark, color="0.35", linewidth=1, linestyle="--")
            axis.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)])
            axis.set_ylim(-0.6, len(bars) - 0.4)
            axis.grid(axis="y", visible=False)
            axis.set_title(title)
        for axis in list(figure.axes)[len(groups) :]:
            axis.set_visible(False)
        return save()


def regression(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    slope: float,
    expected: float | None,
    over: str,
    measure: str,
    name: str,
) -> str:
    """Draw the points of each arm, the least-squares line, and a line of the expected slope through the same center.

    Args:
        points: arm -> (x, y) of each run.
    """
    with _figure(name, (_WIDTH * 0.6, 3.8)) as (figure, save):
        axis = figure.subplots()
        colors = _colors(list(points))
        for label, of_arm in points.items():
            axis.scatter(*zip(*of_arm, strict=True), s=26, color=colors[label], label=label, zorder=3)
        of_all = np.array([point for of_arm in points.values() for point in of_arm])
        x = np.array([of_all[:, 0].min(), of_all[:, 0].max()])
        center = of_all.mean(axis=0)
        if not math.isnan(slope):
            axis.plot(x, center[1] + slope * (x - center[0]), color="0.2", linewidth=1.3, label=f"slope {slope:.4g}")
        if expected is not None:
            line = center[1] + expected * (x - center[0])
            axis.plot(x, line, "--", color="#c0392b", linewidth=1.3, label=f"expected slope {expected:.4g}")
        axis.set_xlabel(over)
        axis.set_ylabel(measure)
        figure.legend(loc="outside right center")
        return save()


def _aligned(of_seeds: Sequence[Series]) -> tuple[list[float], np.ndarray]:
    """Return the steps that all seeds have, and their values ``[seeds, steps]``."""
    logged = [dict(zip(steps, values, strict=True)) for steps, values in of_seeds if steps]
    if not logged:
        return [], np.empty((0, 0))
    steps = sorted(set.intersection(*(set(one) for one in logged)))
    return steps, np.array([[one[step] for step in steps] for one in logged])


def _colors(labels: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    return {label: palette(number % palette.N) for number, label in enumerate(labels)}


@contextlib.contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """Yield a figure, and a function that returns it as SVG without the XML header."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)

        def save() -> str:
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
            return text.getvalue()[text.getvalue().index("<svg") :]

        try:
            yield figure, save
        finally:
            pyplot.close(figure)
