"""Scoring by a Python function (prompt, response) -> float, given by its import path. The user's code is executed.

Further parameters receive the row's fields of the same names; ``**fields`` receives all of them::

    def exact_match(prompt, response, answer):
        return float(response.strip() == answer)
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import inspect
import numbers
import operator
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import LARGEST_REWARD, describe
from nemo_rao.scoring.scorer import Kind, NoScore, Pair, PairScorer, ScoringFailure

EXAMPLE = "nemo_rao.demo.synthetic:ground_truth_reward"


class RuleScorer(PairScorer):
    """Calls the function for each pair, in order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.function = find_function(path)
        self.identity = {"rule": path, "source": _source_digest(self.function)}
        self.asked = asked_for(self.function)
        self.not_given: Counter[str] = Counter()

    def check(self, row: Row) -> None:
        """Check that the rule can be called for a row.

        Raises:
            UserError: the row lacks a field that the rule requires.
        """
        there = {**row.template_fields, **row.fields}
        for name in self.asked.needed:
            if name not in there:
                raise UserError(
                    f"{row.location}: rule {self.path} requires the field {name!r}, which the row does not have (other "
                    f"fields found: {', '.join(there) or 'none'}). Add it, or give the rule's parameter a default."
                )

    def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
        for pair in pairs:
            of_template = (name for name in pair.template_fields if not self.asked.is_read(name))
            self.not_given.update([*of_template, *pair.response_fields])
        with _current_folder_on_path():
            return [self._score(pair) for pair in pairs]

    def take_notes(self) -> Mapping[str, int]:
        counts, self.not_given = self.not_given, Counter()
        return {f"responses with {name}, which is not passed to a rule": count for name, count in counts.items()}

    def _score(self, pair: Pair) -> float:
        prompt = pair.prompt if isinstance(pair.prompt, str) else [dict(message) for message in pair.prompt]
        given = {**pair.template_fields, **pair.row_fields}
        fields = {name: value for name, value in given.items() if self.asked.is_read(name)}
        try:
            value = self.function(prompt, pair.response, **copy.deepcopy(fields))
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ScoringFailure(
                f"{pair.location}: rule {self.path} raised {type(error).__name__}: {error} ({where.filename} line "
                f"{where.lineno}). Fix the rule or drop the row."
            ) from error
        if not isinstance(value, numbers.Real):
            raise ScoringFailure(f"{pair.location}: rule {self.path} returned {describe(value)}, not a number")
        number = float(value)
        if not abs(number) <= LARGEST_REWARD:  # also true for NaN
            raise ScoringFailure(
                f"{pair.location}: rule {self.path} returned {number}; it must be finite and at most {LARGEST_REWARD:g}"
            )
        return number


@dataclass(frozen=True)
class Asked:
    """Fields of a row that a rule's parameters name.

    Attributes:
        needed: required fields.
        names: required and optional fields.
        every: whether it takes all fields, except those named like one of the ``first`` two parameters.
    """

    needed: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    every: bool = False
    first: tuple[str, ...] = ()

    def is_read(self, name: str) -> bool:
        return name in self.names or (self.every and name not in self.first)


def asked_for(function: Callable[..., Any]) -> Asked:
    """Determine the fields from the parameters after prompt and response."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # not written in Python
        return Asked()
    further = parameters[2:]
    named = [one for one in further if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return Asked(
        tuple(one.name for one in named if one.default is one.empty),
        tuple(one.name for one in named),
        any(one.kind is one.VAR_KEYWORD for one in further),
        tuple(one.name for one in parameters[:2]),
    )


def find_function(path: str) -> Callable[[Any, str], Any]:
    """Import ``module:function`` or ``module.function``; the current directory is searched first.

    Raises:
        UserError: no such module or function, or the module cannot be imported.
    """
    module, _, function = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not function:
        raise UserError(f"{path!r} is not an import path. Write module:function, such as {EXAMPLE}.")
    with _current_folder_on_path():
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"there is no module {error.name} in {os.getcwd()} or the installed packages. Check the name, or "
                    "run the command in the module's directory."
                ) from None
            raise UserError(f"module {module} needs {error.name}, which is not installed") from None
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise UserError(f"module {module} cannot be imported ({type(error).__name__}: {error}). Fix it.") from None
    try:
        found = operator.attrgetter(function)(found)
    except AttributeError:
        file = found.__file__ or "built in"
        raise UserError(f"module {module} ({file}) has no {function}. Check the name.") from None
    if not callable(found):
        raise UserError(f"{path} is {describe(found)}, not a function of (prompt, response)")
    return found


def _source_digest(function: Callable[..., Any]) -> str | None:
    """Digest of the file that defines the function; ``None`` if there is none."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return None
    if file is None or not os.path.isfile(file):
        return None
    with open(file, "rb") as source:
        return hashlib.sha256(source.read()).hexdigest()


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may change the path itself
            sys.path.remove(folder)


def rules_among(specs: Sequence[str]) -> dict[str, str]:
    """Specs of rules among ``[NAME=]KIND:ARGUMENT`` specs -> their import paths."""
    found = {spec: spec.rpartition("=")[2].partition(":") for spec in specs}
    return {spec: path for spec, (kind, _, path) in found.items() if kind == "rule"}


RULE = Kind(lambda path, _: RuleScorer(path), lambda path: path.replace(":", ".").split(".")[-1], "module:function")
