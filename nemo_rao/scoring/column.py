"""Rewards that are already in the file, for combining, standardizing, or comparing with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rao.scoring.scorer import InputRow, Kind, NoScore, Scored, Scores


class ColumnScorer:
    """A field of the responses, such as ``r_1``, or a path such as ``annotations.helpfulness.Rating``.

    Args:
        field: empty for the format's own reward field (labels are rewards of 1 and 0).
    """

    forks = False

    def __init__(self, field: str) -> None:
        self.field = field
        self.fields: tuple[str, ...] = (field,) if field else ()
        self.identity: Mapping[str, Any] = {"column": field}

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        return [tuple(self._score(score) for score in self._scores(row)) for row in rows]

    def _scores(self, row: InputRow) -> Scores:
        return row.columns[self.field] if self.field else tuple(response.reward for response in row.responses)

    def _score(self, score: float | None) -> float | NoScore:
        if score is None:
            return NoScore("null or missing in the input")
        return NoScore("not finite in the input") if score != score else score

    def take_notes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass


COLUMN = Kind(lambda field, _: ColumnScorer(field), lambda field: field.split(".")[-1] or "given", "FIELD")
