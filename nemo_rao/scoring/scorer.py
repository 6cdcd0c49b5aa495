"""Interface of scorers, and their input rows.

A scorer receives rows in batches, in file order, and returns for each response a number or the reason why it has none.
Scorers of single (prompt, response) pairs derive from :class:`PairScorer`; a model that scores a prompt's responses
together implements :class:`Scorer` directly.
"""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.writing import ANSWER_FIELDS

Scores = tuple[float | None, ...]  # as written to the file
# Fields of a response with a fixed meaning.
RESERVED = ("content", "reward", "label", "weight", "truncated", "message_fields", *ANSWER_FIELDS)


class ScoringFailure(RuntimeError):
    """Scoring was stopped. The message is one line with location and remedy; finished work is kept."""


@dataclass(frozen=True)
class NoScore:
    """Missing score of a response.

    Attributes:
        reason: short reason, by which such responses are counted.
        detail: details of this response, such as the judge's answer.
    """

    reason: str
    detail: str = field(default="", compare=False)


Scored = tuple[float | NoScore, ...]  # of a row's responses, as returned by a scorer


@dataclass(frozen=True)
class InputRow(Row):
    """A row of the input.

    Attributes:
        columns: field -> rewards of the responses, for the ``fields`` that scorers request.
    """

    columns: Mapping[str, Scores] = field(default_factory=dict)


class Scorer(Protocol):
    """A source of rewards; its scores become one column.

    Attributes:
        fields: fields of the responses to read from the file, passed in ``InputRow.columns``.
        forks: whether it computes in forks of this process. Such scorers run before those that compute in the process
            itself: threads started by the latter would not exist in the forks, which could then deadlock.
        identity: everything its scores depend on, as JSON: a part file with another identity is not resumed.
    """

    fields: tuple[str, ...]
    forks: bool
    identity: Mapping[str, Any]

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        """Return a number per response of each row, or the reason why it has none.

        Raises:
            ScoringFailure: scoring cannot continue.
        """

    def take_notes(self) -> Mapping[str, int]:
        """Return counts for the rows scored since the last call: note -> count."""

    def close(self) -> None:
        """Release all resources. Called once, also after a failure."""


class PairScorer(abc.ABC):
    """A scorer of single (prompt, response) pairs: a rule, a judge behind an endpoint, a judge in this process."""

    fields: tuple[str, ...] = ()
    forks = False
    identity: Mapping[str, Any]

    @abc.abstractmethod
    def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
        """Return a number for each pair, in order, or the reason why it has none."""

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        scores = iter(self.score_pairs([pair for row in rows for pair in pairs_of(row)]))
        return [tuple(itertools.islice(scores, len(row.responses))) for row in rows]

    def take_notes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:  # noqa: B027 (most have nothing to release)
        pass


@dataclass(frozen=True)
class Pair:
    """One response to a prompt.

    Attributes:
        prompt: text, or messages with ``role`` and ``content``.
        response: its text.
        location: file, line and number of the response, for messages.
        response_fields, template_fields: see :class:`nemo_rao.batch.Response` and :class:`nemo_rao.batch.Row`.
        row_fields: ``fields`` of :class:`nemo_rao.batch.Row`.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    response: str
    location: str
    response_fields: Mapping[str, Any] = field(default_factory=dict)
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    row_fields: Mapping[str, Any] = field(default_factory=dict)


def pairs_of(row: Row) -> Iterator[Pair]:
    for number, response in enumerate(row.responses, start=1):
        location = f"{row.location}, response {number}"
        yield Pair(row.prompt, response.content, location, response.fields, row.template_fields, row.fields)


# ------------------------------------------------------------------------------------------- NAME=KIND:ARGUMENT


@dataclass(frozen=True)
class OutputDirectory:
    """Output directory of a run, for scorers that store files there."""

    folder: Path


@dataclass(frozen=True)
class Kind:
    """A kind of scorer.

    Attributes:
        make: (argument, output_dir) -> scorer; raises UserError if the argument is invalid.
        default_name: argument -> name of the column if the user gives none.
        argument: description of the argument, for messages.
    """

    make: Callable[[str, OutputDirectory], Scorer]
    default_name: Callable[[str], str]
    argument: str


def make_scorers(specs: Sequence[str], kinds: Mapping[str, Kind], output_dir: OutputDirectory) -> dict[str, Scorer]:
    """Build scorers: column name -> scorer, in the order given.

    Raises:
        UserError: a spec is not ``[NAME=]KIND:ARGUMENT``, its kind is unknown, or its name is a duplicate or invalid.
    """
    made: dict[str, Scorer] = {}
    try:
        for spec in specs:
            name, kind, argument = parse_spec(spec, kinds)
            if name in made:
                raise UserError(
                    f"--scorer {spec}: column {name!r} exists already. Name the columns, such as r_1={kind}:{argument}"
                )
            try:
                made[name] = kinds[kind].make(argument, output_dir)
            except UserError as error:
                raise UserError(f"--scorer {spec}: {error}") from None
    except BaseException:
        for scorer in made.values():
            scorer.close()
        raise
    return made


def parse_spec(spec: str, kinds: Mapping[str, Kind]) -> tuple[str, str, str]:
    """Split a spec into (column name, kind, argument)."""
    match = re.fullmatch(r"(?:([^=:/]*)=)?([^:=]*)(?::(.*))?", spec, re.DOTALL)
    given, kind, argument = match.group(1, 2, 3) if match else (None, "", None)
    if kind not in kinds:
        forms = ", ".join(f"{name}:{one.argument}" for name, one in kinds.items())
        raise UserError(f"--scorer {spec}: must be [NAME=]KIND:ARGUMENT, one of {forms}")
    argument = argument or ""
    name = kinds[kind].default_name(argument) if given is None else given
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
        raise UserError(
            f"--scorer {spec}: {name!r} cannot name a column. Use letters, digits, _ and -, such as "
            f"r_1={kind}:{argument}"
        )
    if name in RESERVED:
        raise UserError(f"--scorer {spec}: {name!r} is reserved. Use another, such as own_{name}={kind}:{argument}")
    return name, kind, argument
