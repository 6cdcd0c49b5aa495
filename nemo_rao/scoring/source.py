"""The input of scoring: its rows, and their checks before the first response is scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.data.report import LoadReport
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows
from nemo_rao.rows.sources import HUB, OnBad, expand_paths
from nemo_rao.rows.writing import record_of
from nemo_rao.scoring.column import ColumnScorer
from nemo_rao.scoring.rule import RuleScorer
from nemo_rao.scoring.scorer import InputRow, NoScore, Scorer


@dataclass(frozen=True)
class Source:
    """The rows of an input.

    Attributes:
        path: any source that ``nemo_rao.rows.reading.read_rows`` accepts.
        columns: canonical column name -> name in the input.
        ignore_fields: fields to skip.
        drops_bad_rows: drop and count rows that cannot be read; otherwise the first one is an error.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore_fields: tuple[str, ...] = ()
    drops_bad_rows: bool = False

    def rows(self, on_bad: OnBad | None = None, reward_field: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows. If bad rows are dropped, ``on_bad`` is called with their errors."""
        skipped = (on_bad or (lambda _: None)) if self.drops_bad_rows else None
        return read_rows(
            self.path, reward_field=reward_field, columns=self.columns, ignore_fields=self.ignore_fields, on_bad=skipped
        )

    def input_rows(self, fields: Sequence[str], on_bad: OnBad | None = None) -> Iterator[InputRow]:
        """Rows that can be scored, with the rewards that they have under ``fields``."""
        own = {one.name for one in dataclasses.fields(Row)}
        readings = [self.rows(on_bad)] + ([self.rows(on_bad, reward_field=fields)] if fields else [])
        for row, *same in _matched_rows(readings, self.drops_bad_rows):
            columns, unused = {}, set(row.unused)
            for other in same:
                unused &= set(other.unused)
                for at, name in enumerate(fields):
                    values = (response.ensemble[at] for response in other.responses)
                    columns[name] = tuple(None if math.isnan(value) else value for value in values)
            values_of_row = {name: getattr(row, name) for name in own}
            made = InputRow(**values_of_row | {"unused": tuple(sorted(unused))}, columns=columns)
            try:
                _check(made)
            except UserError as error:
                if not self.drops_bad_rows:
                    raise
                if on_bad is not None:
                    on_bad(error)
                continue
            yield made

    def identity(self) -> dict[str, Any]:
        """Everything that the rows depend on: the input's content, not its path (for ``hf:NAME``, its name)."""
        return {
            "digest_of_input": _digest(self.path),
            "columns_of_input": dict(self.columns),
            "ignored_fields": sorted(self.ignore_fields),
            "bad_rows_dropped": self.drops_bad_rows,
        }


def _matched_rows(readings: Sequence[Iterator[Row]], may_differ: bool) -> Iterator[tuple[Row, ...]]:
    """Match the rows of several readings of one input, each of which may have dropped some."""
    if not may_differ:
        yield from zip(*readings, strict=True)
        return
    waiting: list[dict[str, Row]] = [{} for _ in readings]
    unfinished = set(range(len(readings)))
    while unfinished:
        for number in sorted(unfinished):
            if (row := next(readings[number], None)) is None:
                unfinished.discard(number)
                continue
            waiting[number][row.location] = row
            if all(row.location in rows for rows in waiting):
                found = tuple(rows[row.location] for rows in waiting)
                for rows in waiting:  # earlier rows in one reading were dropped in another
                    while next(iter(rows)) != row.location:
                        rows.pop(next(iter(rows)))
                    rows.pop(row.location)
                if len({tuple(one.content for one in same.responses) for same in found}) == 1:
                    yield found


def _check(row: InputRow) -> None:
    if any(response.continuation for response in row.responses):
        raise UserError(
            f"{row.location}: a conversation with several answers cannot be scored. Keep only its last turn."
        )
    try:
        json.dumps(record_of(row))
    except (TypeError, ValueError) as error:
        raise UserError(f"{row.location}: the row cannot be written as JSON ({error}). Drop the row.") from None


@dataclass
class Survey:
    """Summary of the input.

    Attributes:
        num_rows, num_responses: numbers of rows and responses to score.
        notes: remarks on the input for the user.
    """

    num_rows: int = 0
    num_responses: int = 0
    notes: list[str] = field(default_factory=list)


def survey(
    source: Source, scorers: Mapping[str, Scorer], fields: Sequence[str], *, max_bad_rows: float, same_rewards: bool
) -> Survey:
    """Read and check the whole input once.

    Args:
        source: the input.
        scorers: column -> scorer.
        fields: fields of the responses that scorers read.
        max_bad_rows: maximum fraction of bad rows if they are dropped.
        same_rewards: whether the output's rewards are the input's.

    Raises:
        UserError: a row cannot be scored, or too many if they are dropped; there are no rows; or a column taken from
            the input has no rewards.
    """
    found = Survey()
    report = LoadReport()
    bad_locations: set[str] = set()
    num_rewarded = num_references = 0
    empty = {name: scorer for name, scorer in scorers.items() if isinstance(scorer, ColumnScorer)}

    def note_bad(error: UserError) -> None:
        location = str(error).partition(": ")[0]
        if location not in bad_locations:  # two readings of the same row may fail
            bad_locations.add(location)
            report.drop_bad(str(error))

    rules = [scorer for scorer in scorers.values() if isinstance(scorer, RuleScorer)]
    for row in source.input_rows(fields, note_bad):
        found.num_rows += 1
        found.num_responses += len(row.responses)
        num_references += bool(row.reference_rewards)
        num_rewarded += sum(response.reward is not None for response in row.responses)
        for rule in rules:
            rule.check(row)
        report.not_used(name for name in row.unused if not any(rule.asked.is_read(name) for rule in rules))
        empty = {name: one for name, one in empty.items() if all(isinstance(s, NoScore) for s in one.score([row])[0])}
    if report.rows_bad > max_bad_rows * (report.rows_bad + found.num_rows):
        raise UserError(
            f"{source.path}: {report.rows_bad} of {report.rows_bad + found.num_rows} rows are bad, more than "
            f"--max-bad-rows {max_bad_rows:g} allows. Fix them or raise the limit: {'; '.join(report.about_bad())}"
        )
    if not found.num_rows:
        raise UserError(f"{source.path}: has no rows. Pass a file with at least one.")
    for name, column in empty.items():
        where = f" under {column.field}" if column.field else ""
        raise UserError(f"--scorer column: {source.path} has no rewards{where} for column {name}. Leave it out.")
    found.notes += report.about_bad()
    if num_rewarded and not any(isinstance(one, ColumnScorer) and not one.field for one in scorers.values()):
        found.notes.append(
            f"rewards or labels of {num_rewarded} responses in the input are replaced; --scorer column keeps them as "
            "well"
        )
    if num_references and not same_rewards:
        found.notes.append(
            f"reference_rewards of {num_references} rows are kept as input_reference_rewards: they are not on the "
            "scale of these scorers"
        )
    found.notes += report.about_kept()
    return found


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for source in expand_paths(path):
        if source.startswith(HUB):
            digest.update(source.encode())
            continue
        files = sorted(file for file in Path(source).rglob("*") if file.is_file()) or [Path(source)]
        for name in files:
            with open(name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
