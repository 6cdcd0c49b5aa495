"""Checks of a row before tokenisation: which of its responses are used, and whether they are enough.

A row is *bad* where it shows a mistake in the data (no reward where one is needed, too few responses). It is *dropped*
where nothing is wrong with it but that it cannot be learned from here: its samples were cut, all rewards are equal.
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

CUT_SHORT = "too few responses that are not cut short"
CUT_LEFT_OUT = "responses that are cut short are left out (data.truncated=drop)"
CUT_WITHOUT_END = "responses that are cut short are learned without an end token (data.truncated=without_end)"
NOT_FINITE = "a reward is not a finite number, and is not used"


@dataclass(frozen=True)
class Candidate:
    """A row before it is tokenised.

    Attributes:
        read: as it was read.
        row: with the responses that are used; ``None`` where none are.
        bad: what shows a mistake in the data. A row that is dropped for its tokens needs not be right in this.
        dropped: (reason, line about this row).
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
    """What is asked of each row. See :func:`nemo_rao.data.dataset.load_preferences` for the arguments."""

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
                f"{self.min_responses} responses a prompt; raise it"
            )

    def apply(self, read: Row, number: int) -> Candidate:
        """The row as it is used, or why it is not.

        Args:
            number: of the row, on which what is drawn depends.
        """
        whole = [response for response in read.responses if not response.truncated]
        cut, row = len(read.responses) - len(whole), read
        if cut and self.truncated == "drop":
            # Of a pair whose better response was cut, the other one must not become the best.
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
                f"{row.place}: has {len(row.responses)} responses, {self.needed_by} needs at least "
                f"{self.min_responses} a prompt; drop the row or add responses"
            )
        if self.needs_rewards:
            for number, response in enumerate(row.responses, start=1):
                if not is_known(response.reward) or not all(map(is_known, response.ensemble)):
                    raise UserError(
                        f"{row.place}: response {number} has {lacks(response)}, which {self.needed_by} needs; "
                        f"{where_to_add_rewards(row)}"
                    )
        if self.needs_preference and not row.ranked and any(response.reward is None for response in row.responses):
            raise UserError(
                f"{row.place}: its responses have neither an order (chosen, rejected) nor a reward each, and "
                f"{self.needed_by} compares them; add rewards (or labels), or name the field they stand in by "
                "data.reward_field"
            )

    def _why_dropped(self, row: Row) -> tuple[str, str] | None:
        if self.needs_pairs and not has_pair(row):
            return NO_PAIR, f"{row.place}: all responses have the same reward"
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
    return f"{row.place}: {cut} of {len(row.responses)} responses are marked as truncated"
