"""Outcome of loading a data set: counts for the user, and one record per row for ``nemo-rao show``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from nemo_rao.batch import Row, Sample

OTHER_CAUSES = "other causes"
_MOST_CAUSES = 20  # causes of bad rows that are counted separately
_MOST_NAMES = 40  # unused fields that are listed
_LONGEST_LINE = 120  # characters
_LOCATION = re.compile(r"^.*? (?:line|row) \d+: ")
_VALUES = re.compile(r"; |\. (?=[A-Z])| \(|, found | \d+:\d+")
_NUMBER = re.compile(r"(?<![\w'.-])\d[\d.,]*(?![\w'])")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one row.

    Attributes:
        read: the row as it was read; ``None`` if its record cannot be read.
        used: the row with the responses that are used; ``None`` if none are.
        sample: its tokens, also if the row is dropped for its length; ``None`` if it could not be tokenized.
        reason: label under which the row is counted as dropped; ``None``: it is kept.
        detail: one line about a dropped row, with its location.
        remarks: remarks on a kept row (``LoadReport.remarks``).
        left_out: reasons why some of a kept row's responses are not used (``LoadReport.left_out``).
    """

    read: Row | None
    used: Row | None
    sample: Sample | None
    reason: str | None
    detail: str = ""
    remarks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass
class LoadReport:
    """Counts of the rows read. ``str()`` gives one line, :meth:`text` several lines for a long report.

    Attributes:
        rows_read: rows (prompts) in the files, including those that cannot be read.
        rows_kept: rows in the data.
        dropped: reason -> rows.
        bad: cause -> rows with an error in the data, dropped because ``bad_rows`` is ``drop``.
        remarks: remark on kept rows -> rows.
        examples: reason or cause -> message about the first row dropped for it; remark -> location of its first row.
        given, used: fewest and most responses of a kept row, in the file and in the data; empty before the first row.
        left_out: reason why some of a row's responses are not used -> kept rows.
        pairs: for pairwise objectives, description of the compared responses -> kept rows.
        unused: path of a field that nothing reads -> rows that have it.
        notes: peculiarities of the tokenizer and its chat template.
    """

    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    remarks: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    given: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, outcome: Outcome, pair: str | None) -> None:
        """Count a kept row; ``pair`` describes the responses that are compared."""
        assert outcome.read is not None and outcome.used is not None
        self.rows_kept += 1
        given, used = len(outcome.read.responses), len(outcome.used.responses)
        self.given = [min([given, *self.given]), max([given, *self.given])]
        self.used = [min([used, *self.used]), max([used, *self.used])]
        for reason in outcome.left_out:
            _count(self.left_out, reason)
        if pair is not None:
            _count(self.pairs, pair)
        for remark in outcome.remarks:
            _count(self.remarks, remark)
            self.examples.setdefault(remark, outcome.used.location)

    def drop(self, reason: str, example: str) -> None:
        """Count a dropped row; ``example`` is the message about it."""
        _count(self.dropped, reason)
        self.examples.setdefault(reason, example)

    def drop_bad(self, complaint: str) -> str:
        """Count a row with an error in the data. Returns the cause under which it is counted."""
        cause = cause_of(complaint)
        if cause not in self.bad and len(self.bad) >= _MOST_CAUSES:
            cause = OTHER_CAUSES
        _count(self.bad, cause)
        self.examples.setdefault(cause, complaint)
        return cause

    def not_used(self, paths: Iterable[str]) -> None:
        """Count a row's fields that nothing reads."""
        for path in paths:
            _count(self.unused, path)

    @property
    def rows_dropped(self) -> int:
        """Dropped rows, excluding bad ones."""
        return sum(self.dropped.values())

    @property
    def rows_bad(self) -> int:
        return sum(self.bad.values())

    def about_bad(self) -> list[str]:
        """Causes of bad rows, each with its first row."""
        return [
            f"{_rows(rows, 'bad ')} dropped ({'' if rows == 1 else f'{cause}; first: '}{self.examples[cause]})"
            for cause, rows in self.bad.items()
        ]

    def parts(self) -> list[str]:
        """The parts of the report, row counts first."""
        parts = [f"{self.rows_kept} of {self.rows_read} rows kept"]
        parts += [f"{rows} dropped ({reason}; first: {self.examples[reason]})" for reason, rows in self.dropped.items()]
        return parts + self.about_bad() + self.about_kept()

    def about_kept(self) -> list[str]:
        """The parts of the report about kept rows, unused fields and the tokenizer."""
        parts = []
        if self.left_out:
            reasons = " and ".join(self.left_out)
            parts.append(f"{_range(self.used)} of {_range(self.given)} responses per prompt are used ({reasons})")
        if len(self.pairs) == 1:
            parts.append(f"pairs: {next(iter(self.pairs))}")
        elif self.pairs:
            parts.append("pairs: " + ", ".join(f"{pair} ({_rows(rows)})" for pair, rows in self.pairs.items()))
        parts += [f"{_rows(rows)}: {remark} (first: {self.examples[remark]})" for remark, rows in self.remarks.items()]
        if self.unused:
            parts.append(f"unused fields: {_names_by_rows(self.unused)}")
        return parts + self.notes

    def __str__(self) -> str:
        return "; ".join(self.parts())

    def text(self, remark: str = "", already_reported: Collection[str] = ()) -> str:
        """The report on one line if it is short, else with one line per part.

        Args:
            remark: appended to the row counts.
            already_reported: notes that are not repeated.
        """
        first, *others = self.parts()
        parts = [first + remark, *(part for part in others if part not in already_reported)]
        line = "; ".join(parts)
        return line if len(line) <= _LONGEST_LINE else "\n  ".join(parts)


def cause_of(complaint: str) -> str:
    """The part of a message about a row that other rows share: without location, values and remedy."""
    text = _VALUES.split(_LOCATION.sub("", complaint, count=1), maxsplit=1)[0].rstrip(".")
    return _NUMBER.sub("N", re.sub(r"\[\d+\]", "[]", text))


def _count(counts: dict[str, int], kind: str) -> None:
    counts[kind] = counts.get(kind, 0) + 1


def _rows(number: int, kind: str = "") -> str:
    return f"{number} {kind}row" + ("" if number == 1 else "s")


def _range(bounds: list[int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low} to {high}"


def _names_by_rows(counts: dict[str, int]) -> str:
    """``a, b (9 rows), c (2 rows)``: names grouped by their number of rows, in descending order."""
    groups = [
        ", ".join(name for name in list(counts)[:_MOST_NAMES] if counts[name] == rows) + f" ({_rows(rows)})"
        for rows in sorted(Counter(list(counts.values())[:_MOST_NAMES]), reverse=True)
    ]
    more = len(counts) - _MOST_NAMES
    return ", ".join(groups) + (f", and {more} more" if more > 0 else "")
