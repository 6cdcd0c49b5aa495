"""Lengths and rewards of all rows, collected while they are loaded: about 30 bytes per response, no text."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from nemo_rao.data.choice import is_known
from nemo_rao.data.report import Outcome
from nemo_rao.show.rows import roles

_ROLES = ("", "chosen", "rejected")


class Collector:
    """Collects statistics row by row.

    Args:
        needs_pairs: see :func:`nemo_rao.show.rows.roles`.
    """

    def __init__(self, *, needs_pairs: bool) -> None:
        self._needs_pairs = needs_pairs
        self._prompts, self._dropped_prompts = array("q"), array("q")  # tokens, of a row
        self._responses, self._dropped_responses, self._dropped_totals = array("q"), array("q"), array("q")
        self._row_of, self._rewards, self._roles = array("q"), array("d"), array("b")  # of a response

    def add(self, outcome: Outcome) -> None:
        """Add one row, kept or dropped."""
        sample, used = outcome.sample, outcome.used
        if sample is None or used is None:
            return
        prompt, lengths = len(sample.prompt), [len(response) for response in sample.responses]
        if outcome.reason is not None:
            self._dropped_prompts.append(prompt)
            self._dropped_responses.extend(lengths)
            self._dropped_totals.extend(prompt + length for length in lengths)
            return
        row = len(self._prompts)
        self._prompts.append(prompt)
        for length, response, role in zip(
            lengths, used.responses, roles(used, needs_pairs=self._needs_pairs), strict=True
        ):
            self._responses.append(length)
            self._row_of.append(row)
            self._rewards.append(response.reward if is_known(response.reward) else np.nan)
            self._roles.append(_ROLES.index(role))

    def numbers(self, drawn: np.ndarray | None) -> Numbers:
        """The collected statistics; of kept rows only those with the indices ``drawn``, if given."""
        prompts, row_of = _numpy(self._prompts), _numpy(self._row_of)
        is_drawn = np.ones(len(prompts), dtype=bool)
        if drawn is not None:
            is_drawn[:] = False
            is_drawn[drawn] = True
        of_drawn = is_drawn[row_of]
        row_of = (np.cumsum(is_drawn) - 1)[row_of[of_drawn]]
        prompts = prompts[is_drawn]
        responses = _numpy(self._responses)[of_drawn]
        return Numbers(
            prompts=prompts,
            responses=responses,
            totals=prompts[row_of] + responses,
            row_of=row_of,
            rewards=_numpy(self._rewards)[of_drawn],
            chosen=_numpy(self._roles)[of_drawn] == _ROLES.index("chosen"),
            rejected=_numpy(self._roles)[of_drawn] == _ROLES.index("rejected"),
            dropped_prompts=_numpy(self._dropped_prompts),
            dropped_responses=_numpy(self._dropped_responses),
            dropped_totals=_numpy(self._dropped_totals),
        )


@dataclass(frozen=True)
class Numbers:
    """Statistics of N trained rows with R responses, and of dropped rows.

    Attributes:
        prompts: ``[N]``, tokens.
        responses, totals: ``[R]``, tokens of each response, without and with its prompt.
        row_of: ``[R]`` in [0, N), ascending.
        rewards: ``[R]``, NaN if missing.
        chosen, rejected: ``[R]`` bool.
        dropped_prompts, dropped_responses, dropped_totals: the same for dropped rows that could be tokenized.
    """

    prompts: np.ndarray
    responses: np.ndarray
    totals: np.ndarray
    row_of: np.ndarray
    rewards: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    dropped_prompts: np.ndarray
    dropped_responses: np.ndarray
    dropped_totals: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of an epoch, counting each prompt once per response."""
        return int(self.totals.sum())

    @property
    def are_pairs(self) -> bool:
        return bool(self.chosen.any())

    def pair_values(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[R]`` -> (``[pairs]``, ``[pairs]``), values of the chosen and the rejected response of each row."""
        return values[self.chosen], values[self.rejected]  # a row has one of each or none; both are in row order

    def margins(self) -> np.ndarray:
        """``[pairs]``, r(chosen) - r(rejected); without pairs ``[rows]``, highest minus lowest reward of a row."""
        if self.are_pairs:
            chosen, rejected = self.pair_values(self.rewards)
            return chosen - rejected
        if not len(self.row_of):
            return np.empty(0)
        starts = np.flatnonzero(np.diff(self.row_of, prepend=-1))
        several = np.diff(np.append(starts, len(self.row_of))) > 1
        return (np.maximum.reduceat(self.rewards, starts) - np.minimum.reduceat(self.rewards, starts))[several]

    def remarks(self) -> list[str]:
        """Remarks on relations that the charts do not show."""
        found = []
        if self.are_pairs:
            margins = self.margins()
            known = margins[~np.isnan(margins)]
            if (against := int((known < 0).sum())) > 0:
                found.append(f"{against:,} of {len(known):,} pairs: the rejected response has the higher reward")
            chosen, rejected = self.pair_values(self.responses)
            longer, pairs = int((chosen > rejected).sum()), len(chosen)
            found.append(
                f"{longer:,} of {pairs:,} pairs ({longer / pairs:.0%}): the chosen response is the longer one; mean "
                f"tokens {chosen.mean():,.0f} chosen, {rejected.mean():,.0f} rejected"
            )
        elif (correlation := self._correlation()) is not None:
            found.append(f"correlation of a response's reward with its length: {correlation:+.2f}")
        return found

    def _correlation(self) -> float | None:
        known = ~np.isnan(self.rewards)
        rewards, lengths = self.rewards[known], self.responses[known]
        if len(rewards) < 3 or np.ptp(rewards) == 0 or np.ptp(lengths) == 0:
            return None
        scaled = rewards / np.abs(rewards).max()  # the square of 1e300 would overflow
        found = float(np.corrcoef(scaled, lengths)[0, 1])
        return found if np.isfinite(found) else None


def _numpy(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype={"q": np.int64, "d": np.float64, "b": np.int8}[values.typecode]).copy()
