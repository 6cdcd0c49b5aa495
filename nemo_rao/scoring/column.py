"""Rewards that the file has already: to combine, standardise, or compare others with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rao.scoring.scorer import InputRow, Kind, Scores


class ColumnScorer:
    """A field of the responses, such as ``r_1``, or a path such as ``annotations.helpfulness.Rating``.

    Args:
        field: empty for the reward where the file's format has it (labels are rewards of 1 and 0).
    """

    forks = False

    def __init__(self, field: str) -> None:
        self.field = field
        self.fields: tuple[str, ...] = (field,) if field else ()
        self.identity: Mapping[str, Any] = {"column": field}

    def score(self, rows: Sequence[InputRow]) -> list[Scores]:
        if self.field:
            return [row.columns[self.field] for row in rows]
        # NaN stands for a number that is not finite: no score.
        return [
            tuple(None if response.reward != response.reward else response.reward for response in row.responses)
            for row in rows
        ]

    def notes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        pass


COLUMN = Kind(lambda field, _: ColumnScorer(field), lambda field: field.split(".")[-1] or "given", "FIELD")
