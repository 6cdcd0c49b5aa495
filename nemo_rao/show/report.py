"""Contents shared by terminal and page: reasons for dropping rows, remarks, charts with titles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nemo_rao.data.report import LoadReport
from nemo_rao.show.histogram import Histogram, histogram, number
from nemo_rao.show.inspection import Inspection
from nemo_rao.show.numbers import Numbers

NOT_DRAWN = "kept, but not drawn: data.num_prompts trains on other rows"
KEPT, DROPPED, IN_BETWEEN = "trained on", "dropped", "in between"


@dataclass(frozen=True)
class Chart:
    """One histogram with title.

    Attributes:
        summary: one line of statistics.
    """

    title: str
    summary: str
    histogram: Histogram

    @property
    def is_stacked(self) -> bool:
        """Whether its series are parts of a whole; otherwise they are compared."""
        return KEPT in self.histogram.counts


def reasons(report: LoadReport) -> list[tuple[str, int, str]]:
    """(reason, rows, message about the first one) in descending order of rows."""
    counts = {**report.dropped, **report.bad}
    found = [(reason, rows, report.examples[reason]) for reason, rows in counts.items()]
    return sorted(found, key=lambda one: -one[1])


def remarks(seen: Inspection) -> list[str]:
    """Remarks of the loader and of the statistics."""
    found = [*seen.report.about_kept(), *seen.numbers.remarks()]
    if seen.first is not None and seen.report.rows_read >= seen.first:
        found.insert(0, f"only the first {seen.first:,} rows were read (--first); a run reads all")
    if seen.validation is not None:
        notes = seen.report.notes
        found += [f"validation data: {part}" for part in seen.validation.parts() if part not in notes]
    if seen.shared is not None:
        found.append(f"validation data: {seen.shared}")
    return found


def charts(seen: Inspection) -> list[tuple[str, list[Chart]]]:
    """Charts in titled groups. Series without values are left out."""
    numbers, limit = seen.numbers, float(seen.seq_length)
    lengths = [
        ("prompt", numbers.prompts, numbers.dropped_prompts),
        ("response, with its end token", numbers.responses, numbers.dropped_responses),
        ("prompt and response", numbers.totals, numbers.dropped_totals),
    ]
    groups = [
        (
            f"Lengths in tokens (model.seq_length {seen.seq_length:,})",
            [_lengths(title, {KEPT: kept, DROPPED: dropped}, limit) for title, kept, dropped in lengths],
        ),
        ("Rewards", list(_rewards(numbers))),
    ]
    return [(title, found) for title, group in groups if (found := [chart for chart in group if chart is not None])]


def _lengths(title: str, series: Mapping[str, np.ndarray], limit: float) -> Chart | None:
    made = histogram({name: values for name, values in series.items() if len(values)}, mark=limit, from_zero=True)
    return None if made is None else Chart(title, _summary(series[KEPT]) + _cut(made), made)


def _rewards(numbers: Numbers) -> list[Chart | None]:
    if numbers.are_pairs:
        between = ~numbers.chosen & ~numbers.rejected
        series = {"chosen": numbers.rewards[numbers.chosen], "rejected": numbers.rewards[numbers.rejected]}
        if between.any():
            series[IN_BETWEEN] = numbers.rewards[between]
        margin = "margin: reward of the chosen minus the rejected response"
    else:
        series = {KEPT: numbers.rewards}
        margin = "spread: highest minus lowest reward of a prompt"
    return [
        _chart("rewards" if numbers.are_pairs else "rewards of responses", series),
        _chart(margin, {KEPT: numbers.margins()}),
    ]


def _chart(title: str, series: Mapping[str, np.ndarray]) -> Chart | None:
    made = histogram(series, bins=28 if len(series) == 1 else 16)
    if made is None:
        return None
    if len(series) == 1:
        summary = _summary(next(iter(series.values())))
    else:
        known = {name: values[~np.isnan(values)] for name, values in series.items()}
        summary = ", ".join(f"mean {number(values.mean())} {name}" for name, values in known.items() if len(values))
    return Chart(title, summary + _cut(made), made)


def _cut(made: Histogram) -> str:
    """Labels of the outer bars if they also count values beyond the axis."""
    bars = (f"first bar: {made.label(0)}", f"last bar: {made.label(len(made.totals) - 1)}")
    return "".join(f"; {bar}" for bar, is_cut in zip(bars, made.is_cut, strict=True) if is_cut)


def _summary(values: np.ndarray) -> str:
    """Summarize values: "12 to 890, median 240, 95 % up to 610"."""
    known = values[np.isfinite(values)]
    if not len(known):
        return ""
    low, median, most, high = np.percentile(known, (0, 50, 95, 100), method="nearest").tolist()
    return f"{number(low)} to {number(high)}, median {number(median)}, 95 % up to {number(most)}"
