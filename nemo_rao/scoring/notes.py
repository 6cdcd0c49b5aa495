"""What scorers count beside scores, such as answers asked for again; kept with the rows, so that no count is lost.

A run may be stopped and go on, and its report is about all rows of the output: counts stand in the part file, in the
last item of the rows that they belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_rao.scoring.scorer import Scorer

NOTES = "notes"  # the field of an item in the part file


def put_notes(records: Sequence[dict[str, Any]], scorers: Mapping[str, Scorer]) -> None:
    """Puts what the scorers have counted since the last time into the last of some items."""
    records[-1][NOTES] = {column: dict(scorer.take_notes()) for column, scorer in scorers.items()}


def total_notes(records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Column -> what is counted -> how many, over all items."""
    totals: dict[str, Counter[str]] = {column: Counter() for column in columns}
    for record in records:
        for column, counts in record.get(NOTES, {}).items():
            totals[column].update(counts)
    return {column: dict(counts) for column, counts in totals.items()}
