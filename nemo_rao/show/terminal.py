"""Text output of an inspection for terminals, with color if supported."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from nemo_rao.show.histogram import Histogram, number, ticks
from nemo_rao.show.inspection import Inspection
from nemo_rao.show.pieces import Kind, Piece, further_tokens, runs, visible
from nemo_rao.show.report import NOT_DRAWN, Chart, charts, reasons, remarks
from nemo_rao.show.rows import ShownResponse, ShownRow, left_out_text, reward_parts

_COLOURS = {Kind.PROMPT: "36", Kind.TEMPLATE: "2", Kind.RESPONSE: "32", Kind.END: "7;32"}
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CHART_LINES = 3
_MOST_CHARACTERS = 900  # of a prompt or response, without --full
_MOST_OF_DROPPED = 300  # the same for dropped rows
_INDENT = "  "


def can_show_color() -> bool:
    """Whether stdout is a terminal and color is not disabled (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    return max(40, min(120, shutil.get_terminal_size((100, 24)).columns))


class Writer:
    """Formats an inspection.

    Args:
        color: write escape sequences for colors.
        width: characters per line.
        full: do not shorten texts.
    """

    def __init__(self, *, color: bool, width: int, full: bool = False) -> None:
        self._color, self._width, self._full = color, width, full

    def lines(self, seen: Inspection) -> Iterator[str]:
        """All lines of the output."""
        yield self._paint("1", f"{visible(seen.source)}  ·  {visible(seen.recipe)}")
        yield ""
        yield from self._settings(seen)
        yield from self._heading("Rows as trained on")
        yield from self._legend(seen)
        for row in seen.rows:
            yield from self._row(row, seen, _MOST_CHARACTERS)
        asked = {row.location for row in seen.rows}
        if others := [row for row in seen.dropped if row.location not in asked]:
            yield from self._heading("First row dropped for each reason")
            for row in others:
                yield from self._row(row, seen, _MOST_OF_DROPPED)
        for title, group in charts(seen):
            yield from self._heading(title)
            for chart in group:
                yield from self._chart(chart)
        yield from self._counts(seen)

    # ------------------------------------------------------------------------------------------- settings, counts

    def _settings(self, seen: Inspection) -> Iterator[str]:
        own = [one for one in seen.settings if not one.is_default]
        longest = max(len(one.name) for one in own)
        for one in own:
            yield from self._wrapped(visible(one.value), first=f"{one.name:{longest}}  ", rest=" " * (longest + 2))

    def _counts(self, seen: Inspection) -> Iterator[str]:
        report, numbers = seen.report, seen.numbers
        yield from self._heading("Rows")
        kept = f"{report.rows_kept:,} of {report.rows_read:,} rows kept"
        yield self._paint("1", kept) + (
            "" if seen.num_trained == report.rows_kept else f", {seen.num_trained:,} drawn (data.num_prompts)"
        )
        yield f"{len(numbers.responses):,} responses, {numbers.num_tokens:,} tokens; {seen.steps}"
        for reason, rows, example in reasons(report):
            yield self._paint("31", f"{rows:7,} dropped") + f"  {visible(reason)}"
            yield from self._wrapped(visible(seen.short(example)), first=" " * 17, rest=" " * 17, code="2")
        for remark in remarks(seen):
            yield from self._wrapped(visible(seen.short(remark)), first="· ", rest="  ")

    # ------------------------------------------------------------------------------------------------------ charts

    def _chart(self, chart: Chart) -> Iterator[str]:
        yield from self._wrapped(f"{chart.title}: {chart.summary}", first="", rest=_INDENT)
        shown = chart.histogram
        parts = {"": shown.totals} if chart.is_stacked else shown.counts
        up_to_mark = shown.bins_up_to_mark() * bar_width(shown, self._width)
        for name, counts in parts.items():
            if name:
                yield self._paint("2", _INDENT + name)
            for line in bars(counts, bar_width(shown, self._width)):
                yield _INDENT + line[:up_to_mark] + self._paint("31", line[up_to_mark:])
        yield from (_INDENT + line for line in axis(shown, bar_width(shown, self._width)))

    # -------------------------------------------------------------------------------------------------------- rows

    def _legend(self, seen: Inspection) -> Iterator[str]:
        prompt = "prompt" + (" (its log-probability is trained as well)" if seen.prompt_is_learned else "")
        names = {
            Kind.PROMPT: prompt,
            Kind.TEMPLATE: "not learned: template" if not seen.prompt_is_learned else "template, other turns",
            Kind.RESPONSE: "response",
            Kind.END: "end token",
        }
        yield "  ".join(self._kind(kind, name) for kind, name in names.items())

    def _row(self, row: ShownRow, seen: Inspection, most: int) -> Iterator[str]:
        yield ""
        yield self._paint("1", visible(seen.short(row.location)))
        if row.problem is not None:
            yield from self._wrapped(visible(f"dropped: {row.problem[0]} ({seen.short(row.problem[1])})"), code="31")
        if not row.is_drawn:
            yield from self._wrapped(NOT_DRAWN, code="31")
        if row.unused:
            yield from self._wrapped(visible(f"unused fields: {', '.join(row.unused)}"), code="2")
        if not row.responses:
            return
        size = "" if row.num_prompt_tokens is None else f" · {row.num_prompt_tokens:,} tokens"
        yield self._paint("1", f"{_INDENT}prompt{size}")
        yield from self._text(row.prompt, row.prompt_text, Kind.PROMPT, most)
        yield from self._further(row.prompt, row.num_prompt_tokens)
        for response in row.responses:
            yield self._paint("1", f"{_INDENT}{response_title(response, row)}")
            yield from self._text(response.pieces, response.text, Kind.TEMPLATE, most)
            yield from self._further(response.pieces, response.num_tokens)
            if response.pieces and not response.ended:
                yield self._paint("2", f"{_INDENT * 2}(no end token)")

    def _text(self, pieces: Sequence[Piece], text: str, kind: Kind, most: int) -> Iterator[str]:
        """A prompt's or a response's text, line by line, with its middle left out if it is long."""
        parts = list(runs(pieces)) if pieces else [(kind, text)]
        if not self._full:
            parts = _shortened(parts, most)
        painted = "".join(self._kind(part_kind, visible(part)) for part_kind, part in parts)
        for line in painted.split("\n"):
            yield _INDENT * 2 + line

    def _further(self, pieces: Sequence[Piece], num_tokens: int | None) -> Iterator[str]:
        if further := further_tokens(pieces, num_tokens):
            yield self._paint("2", f"{_INDENT * 2}[… {further:,} more tokens; --full shows all …]")

    def _kind(self, kind: Kind, text: str) -> str:
        """Color a text by its kind, line by line; without colors, text that is not learned is in ⟦⟧."""
        if not self._color:
            return f"⟦{text}⟧" if kind is Kind.TEMPLATE else f"{text}⏹" if kind is Kind.END else text
        return "\n".join(self._paint(_COLOURS[kind], line) if line else "" for line in text.split("\n"))

    # ------------------------------------------------------------------------------------------------------- lines

    def _heading(self, title: str) -> Iterator[str]:
        yield ""
        yield self._paint("1", f"── {title} ".ljust(self._width, "─"))

    def _wrapped(self, text: str, *, first: str = _INDENT, rest: str = _INDENT, code: str = "") -> Iterator[str]:
        for line in textwrap.wrap(
            text, self._width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        ) or [first]:
            yield self._paint(code, line) if code else line

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text else text


def response_title(response: ShownResponse, row: ShownRow) -> str:
    """Title of a response: "response 2 · chosen by reward · reward 0.92 · 131 tokens"."""
    parts = [f"response {response.number}"]
    if response.role:
        parts.append(f"{response.role} by {row.compared_by}")
    parts += reward_parts(response, row)
    if response.num_tokens is not None:
        parts.append(f"{response.num_tokens:,} tokens")
    if response.truncated:
        parts.append("truncated")
    if response.left_out is not None:
        parts.append(left_out_text(response))
    return visible(" · ".join(parts))


def bar_width(histogram: Histogram, width: int) -> int:
    """Width of one bar in characters, for lines of ``width``."""
    return max(1, min(3, (width - len(_INDENT)) // len(histogram.totals)))


def bars(counts: np.ndarray, wide: int) -> list[str]:
    """Draw bars on three lines, each ``wide`` characters wide. A nonzero count is always visible."""
    levels = np.ceil(counts / max(1, counts.max()) * _CHART_LINES * (len(_BLOCKS) - 1)).astype(int)
    lines = []
    for line in reversed(range(_CHART_LINES)):
        height = np.clip(levels - line * (len(_BLOCKS) - 1), 0, len(_BLOCKS) - 1)
        lines.append("".join(_BLOCKS[one] * wide for one in height).rstrip())
    return lines


def axis(histogram: Histogram, wide: int) -> list[str]:
    """The axis under the bars with the mark, and below it as many numbers as fit."""
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    columns = wide * len(histogram.totals)
    line, labels = ["─"] * columns, [" "] * (columns + 12)
    values = ticks(histogram)
    if histogram.mark is not None and low <= histogram.mark < high:
        values = [histogram.mark, *values]  # the first one takes precedence
        line[_column(histogram.mark, histogram, columns)] = "┼"
    for value in values:
        at, text = _column(value, histogram, columns), number(value)
        start = max(0, at - len(text) // 2)
        if all(one == " " for one in labels[max(0, start - 1) : start + len(text) + 1]):
            labels[start : start + len(text)] = text
            line[min(at, columns - 1)] = "┼" if value == histogram.mark else "┴"
    return ["".join(line), "".join(labels).rstrip()]


def _column(value: float, histogram: Histogram, columns: int) -> int:
    low, high = histogram.edges[0], histogram.edges[-1]
    return int((value - low) / (high - low) * columns + 1e-6)


def _shortened(parts: Sequence[tuple[Kind, str]], most: int) -> list[tuple[Kind, str]]:
    """Shorten to ``most`` characters, two thirds from the beginning and one third from the end."""
    total = sum(len(text) for _, text in parts)
    if total <= most * 5 // 4:
        return list(parts)
    first, last = most * 2 // 3, total - most // 3
    kept: list[tuple[Kind, str]] = []
    at, is_cut = 0, False
    for kind, text in parts:
        start, end = at, at + len(text)
        at = end
        if start < first:
            kept.append((kind, text[: first - start]))
        if end > first and not is_cut:
            is_cut = True
            kept.append((kind, f" [… {last - first:,} characters; --full shows all …] "))
        if end > last:
            kept.append((kind, text[max(0, last - start) :]))
    return [(kind, "".join(text for _, text in group)) for kind, group in itertools.groupby(kept, lambda one: one[0])]
