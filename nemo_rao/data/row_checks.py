"""Checks of a row before tokenization: selection of its responses, and whether they suffice.

A row is *bad* if it has an error (a missing reward that is needed, too few responses). It is *dropped* if it is valid
but nothing can be learned from it here: its responses were truncated, or all rewards are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nemo_rao.batch import Row
from nemo_rao.data.choice import (
    NO_PAIR,
    PairsBy,
    Responses,
    choose_responses,
    first_responses,
    has_pair,
    is_known,
    lacks,
    prefer_by,
    where_to_add_rewards,
)
from nemo_rao.errors import UserError

Truncated = Literal["drop", "without_end"]

CUT_SHORT = "too few responses that are not truncated"
CUT_LEFT_OUT = "truncated responses are left out (data.truncated=drop)"
CUT_WITHOUT_END = "truncated responses are learned without an end token (data.truncated=without_end)"
NOT_FINITE = "a reward is not a finite number and is not used"


@dataclass(frozen=True)
class Candidate:
    """A row before it is tokenized.

    Attributes:
        read: the row as it was read.
        row: the row with the responses that are used; ``None`` if none are.
        bad: the error in the row. Ignored if the row is dropped for its tokens.
        dropped: (reason, message about this row).
        remarks, left_out: see ``report.Outcome``.
    """

    read: Row
    row: Row | None
    bad: UserError | None = None
    dropped: tuple[str, str] | None = None
    remarks: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowChecks:
    """Requirements on each row. See :func:`nemo_rao.data.dataset.load_preferences` for the arguments."""

    num_responses: int | None
    min_responses: int
    needs_rewards: bool
    needs_preference: bool
    needs_pairs: bool
    needed_by: str
    responses: Responses
    pairs_by: PairsBy
    seed: int
    truncated: Truncated

    def __post_init__(self) -> None:
        if self.num_responses is not None and self.num_responses < self.min_responses:
            raise UserError(
                f"data.num_responses is {self.num_responses}, but {self.needed_by} needs at least "
                f"{self.min_responses} responses per prompt. Raise it."
            )

    def apply(self, read: Row, number: int) -> Candidate:
        """Check a row and select its responses.

        Args:
            number: index of the row, which seeds random choices.
        """
        whole = [response for response in read.responses if not response.truncated]
        cut, row = len(read.responses) - len(whole), read
        if cut and self.truncated == "drop":
            # If the better response of a pair was truncated, the other one must not become the best.
            only_worse = read.ranked and read.responses[0].truncated and len(whole) == 1
            if len(whole) < max(1, self.min_responses) or only_worse:
                return Candidate(read, None, dropped=(CUT_SHORT, _cut_short(read, cut)))
            row = replace(read, responses=tuple(whole))
        try:
            used = self._choose(row, number)
        except UserError as complaint:
            return Candidate(read, row, bad=complaint)
        dropped = self._why_dropped(used)
        return Candidate(
            read, used, None, dropped, tuple(self._remarks(used, cut)), tuple(self._why_left_out(read, row, used))
        )

    def _choose(self, row: Row, number: int) -> Row:
        preferred = prefer_by(first_responses(row, self.num_responses), self.pairs_by)
        self._check_responses(preferred)
        return choose_responses(preferred, self.responses, seed=self.seed, number=number)

    def _check_responses(self, row: Row) -> None:
        if len(row.responses) < self.min_responses:
            raise UserError(
                f"{row.location}: has {len(row.responses)} responses, but {self.needed_by} needs at least "
                f"{self.min_responses} per prompt. Drop the row or add responses."
            )
        if self.needs_rewards:
            for number, response in enumerate(row.responses, start=1):
                if not is_known(response.reward) or not all(map(is_known, response.ensemble)):
                    raise UserError(
                        f"{row.location}: response {number} has {lacks(response)}, but {self.needed_by} needs one. "
                        f"{where_to_add_rewards(row)}"
                    )
        if self.needs_preference and not row.ranked and any(response.reward is None for response in row.responses):
            raise UserError(
                f"{row.location}: its responses have neither an order (chosen, rejected) nor a reward each, and "
                f"{self.needed_by} compares them. Add rewards (or labels), or set data.reward_field to the field that "
                "holds the rewards."
            )

    def _why_dropped(self, row: Row) -> tuple[str, str] | None:
        if self.needs_pairs and not has_pair(row):
            return NO_PAIR, f"{row.location}: all responses have the same reward"
        return None

    def _remarks(self, row: Row, cut: int) -> Iterator[str]:
        if cut and self.truncated == "drop":
            yield CUT_LEFT_OUT
        if any(response.truncated for response in row.responses):
            yield CUT_WITHOUT_END
        if any(response.reward is not None and not is_known(response.reward) for response in row.responses):
            yield NOT_FINITE

    def _why_left_out(self, read: Row, row: Row, used: Row) -> Iterator[str]:
        if len(row.responses) < len(read.responses):
            yield f"data.truncated={self.truncated}"
        first = len(first_responses(row, self.num_responses).responses)
        if first < len(row.responses):
            yield f"data.num_responses={self.num_responses}"
        if len(used.responses) < first:
            yield f"data.responses={self.responses}"


def _cut_short(row: Row, cut: int) -> str:
    return f"{row.location}: {cut} of {len(row.responses)} responses are marked as truncated"
