"""What a scorer is, and the rows it sees.

A scorer is given rows in batches, in the file's order, and gives each response a number, or why it has none. Those that
look at one (prompt, response) at a time derive from :class:`PairScorer`; a model that scores a prompt's responses
together implements :class:`Scorer` itself.
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

Scores = tuple[float | None, ...]  # as they are written
# Fields of a response that have a meaning of their own.
RESERVED = ("content", "reward", "label", "weight", "truncated", "message_fields", *ANSWER_FIELDS)


class ScoringFailure(RuntimeError):
    """What stopped scoring under way, in one line with place and remedy. What is done is kept."""


@dataclass(frozen=True)
class NoScore:
    """A response has no score.

    Attributes:
        reason: in a few words, by which such responses are counted.
        detail: what the user should see of this one, such as the judge's answer.
    """

    reason: str
    detail: str = field(default="", compare=False)


Scored = tuple[float | NoScore, ...]  # of a row's responses, as a scorer gives them


@dataclass(frozen=True)
class InputRow(Row):
    """A row of the input.

    Attributes:
        columns: field -> reward of each response under it, for the fields that scorers named (``fields``).
    """

    columns: Mapping[str, Scores] = field(default_factory=dict)


class Scorer(Protocol):
    """A source of rewards; its scores become one column.

    Attributes:
        fields: fields of the responses it reads from the file, handed to it in ``InputRow.columns``.
        forks: it computes in forks of this process, and so is asked before a scorer that computes in the process
            itself: threads that this has started would be missing in the forks, which would wait for them for ever.
        identity: all that its scores depend on, as JSON: a part file of another identity is not continued.
    """

    fields: tuple[str, ...]
    forks: bool
    identity: Mapping[str, Any]

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        """For each row a number per response, or why it has none.

        Raises:
            ScoringFailure: no use in going on.
        """

    def take_notes(self) -> Mapping[str, int]:
        """What was counted since the last call, by what it is: of the rows scored since then."""

    def close(self) -> None:
        """Gives back what it holds. Called once, also after a failure."""


class PairScorer(abc.ABC):
    """A scorer of single (prompt, response) pairs: a rule, a judge behind an endpoint, a judge in this process."""

    fields: tuple[str, ...] = ()
    forks = False
    identity: Mapping[str, Any]

    @abc.abstractmethod
    def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
        """A number for each pair, in order, or why it has none."""

    def score(self, rows: Sequence[InputRow]) -> list[Scored]:
        scores = iter(self.score_pairs([pair for row in rows for pair in pairs_of(row)]))
        return [tuple(itertools.islice(scores, len(row.responses))) for row in rows]

    def take_notes(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        pass


@dataclass(frozen=True)
class Pair:
    """One response to a prompt.

    Attributes:
        prompt: text, or messages with ``role`` and ``content``.
        response: its text.
        place: file, line and number of the response, for messages.
        response_fields, template_fields: see :class:`nemo_rao.batch.Response` and :class:`nemo_rao.batch.Row`.
        row_fields: ``fields`` of :class:`nemo_rao.batch.Row`.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    response: str
    place: str
    response_fields: Mapping[str, Any] = field(default_factory=dict)
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    row_fields: Mapping[str, Any] = field(default_factory=dict)


def pairs_of(row: Row) -> Iterator[Pair]:
    for number, response in enumerate(row.responses, start=1):
        place = f"{row.place}, response {number}"
        yield Pair(row.prompt, response.content, place, response.fields, row.template_fields, row.fields)


# ------------------------------------------------------------------------------------------- NAME=KIND:ARGUMENT


@dataclass(frozen=True)
class Place:
    """Where a run writes, for scorers that keep something beside it."""

    folder: Path


@dataclass(frozen=True)
class Kind:
    """A kind of scorer.

    Attributes:
        make: (argument, place) -> scorer; raises UserError where the argument names nothing usable.
        default_name: the column's name where the user gives none.
        argument: what the argument is, for messages.
    """

    make: Callable[[str, Place], Scorer]
    default_name: Callable[[str], str]
    argument: str


def make_scorers(specs: Sequence[str], kinds: Mapping[str, Kind], place: Place) -> dict[str, Scorer]:
    """Column name -> scorer, in the order given.

    Raises:
        UserError: a text that is no ``[NAME=]KIND:ARGUMENT``, a kind there is not, a name twice or not allowed.
    """
    made: dict[str, Scorer] = {}
    try:
        for spec in specs:
            name, kind, argument = parse_spec(spec, kinds)
            if name in made:
                raise UserError(f"--scorer {spec}: a second column {name!r}; name them, such as r_1={kind}:{argument}")
            try:
                made[name] = kinds[kind].make(argument, place)
            except UserError as error:
                raise UserError(f"--scorer {spec}: {error}") from None
    except BaseException:
        for scorer in made.values():
            scorer.close()
        raise
    return made


def parse_spec(spec: str, kinds: Mapping[str, Kind]) -> tuple[str, str, str]:
    """(column name, kind, argument) of one text."""
    match = re.fullmatch(r"(?:([^=:/]*)=)?([^:=]*)(?::(.*))?", spec, re.DOTALL)
    given, kind, argument = match.group(1, 2, 3) if match else (None, "", None)
    if kind not in kinds:
        forms = ", ".join(f"{name}:{one.argument}" for name, one in kinds.items())
        raise UserError(f"--scorer {spec}: must be [NAME=]KIND:ARGUMENT; there are {forms}")
    argument = argument or ""
    name = kinds[kind].default_name(argument) if given is None else given
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
        raise UserError(
            f"--scorer {spec}: {name!r} cannot name a column; give one of letters, digits, _ and -, such as "
            f"r_1={kind}:{argument}"
        )
    if name in RESERVED:
        raise UserError(f"--scorer {spec}: {name!r} is taken; give another name, such as own_{name}={kind}:{argument}")
    return name, kind, argument
