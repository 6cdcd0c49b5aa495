"""Counts that scorers report along with scores, such as repeated questions.

They are stored in the part file, in the last item of the rows that they belong to, so that the report of a resumed run
covers all rows of the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_rao.scoring.scorer import Scorer

NOTES = "notes"  # the field of an item in the part file


def put_notes(records: Sequence[dict[str, Any]], scorers: Mapping[str, Scorer]) -> None:
    """Store the scorers' counts since the last call in the last of the items."""
    records[-1][NOTES] = {column: dict(scorer.take_notes()) for column, scorer in scorers.items()}


def total_notes(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Column -> note -> count, summed over all items."""
    totals: dict[str, Counter[str]] = {column: Counter() for column in columns}
    for record in records:
        for column, counts in record.get(NOTES, {}).items():
            totals[column].update(counts)
    return {column: dict(counts) for column, counts in totals.items()}
