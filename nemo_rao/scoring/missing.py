"""Responses without a score: reasons, counts, and the limit on their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.scoring.scorer import NoScore, Scored, ScoringFailure

WITHOUT = "without_score"  # the field of an item in the part file


class Missing:
    """Counts responses without a score over the items of a part file.

    Args:
        columns: names of the columns.
        num_responses: number of responses in the whole input.
        limit: maximum fraction of them without a score.
    """

    def __init__(self, columns: Sequence[str], num_responses: int, limit: float) -> None:
        self.columns, self.num_responses, self.limit = columns, num_responses, limit
        self.counts: dict[str, Counter[str]] = {}
        self.first: dict[tuple[str, str], str] = {}

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            for column, entries in record.get(WITHOUT, {}).items():
                for reason, where in entries:
                    self.counts.setdefault(column, Counter())[reason] += 1
                    self.first.setdefault((column, reason), where)

    def check(self) -> None:
        """Check the limit, as a fraction of the whole input.

        Raises:
            ScoringFailure: the limit is exceeded, whatever the remaining rows give.
        """
        for column in self.columns:
            count = self.counts.get(column, Counter()).total()
            if count > self.limit * self.num_responses:
                raise ScoringFailure(
                    f"column {column}: {count} of {self.num_responses} responses have no score, more than "
                    f"--max-missing {self.limit:g} allows: {'; '.join(self.of(column))}. Fix the cause, or raise "
                    "--max-missing"
                )

    def of(self, column: str) -> list[str]:
        """One text per reason, with the location of its first response."""
        return [
            f"{count} {reason} (the first: {self.first[column, reason]})"
            for reason, count in self.counts.get(column, Counter()).most_common()
        ]

    def as_json(self) -> dict[str, dict[str, int]]:
        """Column -> reason -> responses."""
        return {column: dict(counts) for column, counts in self.counts.items()}


def reasons_of(row: Row, scores: Mapping[str, Scored]) -> dict[str, Any]:
    """Part of an item in the part file about responses without a score; empty if all have one."""
    entries: dict[str, list[list[str]]] = {}
    for column, values in scores.items():
        for number, value in enumerate(values, start=1):
            if isinstance(value, NoScore):
                where = f"{row.location}, response {number}{f': {value.detail}' if value.detail else ''}"
                entries.setdefault(column, []).append([value.reason, where])
    return {WITHOUT: entries} if entries else {}
