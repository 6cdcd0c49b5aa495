"""A Python function (prompt, response) -> float, named by its import path. It is the user's own code, and is run."""

from __future__ import annotations

import contextlib
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
from typing import Any

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
        self.not_given: Counter[str] = Counter()

    def score_pairs(self, pairs: Sequence[Pair]) -> Sequence[float | NoScore]:
        for pair in pairs:
            self.not_given.update([*pair.template_fields, *pair.response_fields])
        with _current_folder_on_path():
            return [self._score(pair) for pair in pairs]

    def take_notes(self) -> Mapping[str, int]:
        counts, self.not_given = self.not_given, Counter()
        return {f"responses with {name}, which a rule is not given": count for name, count in counts.items()}

    def _score(self, pair: Pair) -> float:
        prompt = pair.prompt if isinstance(pair.prompt, str) else [dict(message) for message in pair.prompt]
        try:
            value = self.function(prompt, pair.response)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ScoringFailure(
                f"{pair.place}: rule {self.path} raised {type(error).__name__}: {error} ({where.filename} line "
                f"{where.lineno}); mend the rule or drop the row"
            ) from error
        if not isinstance(value, numbers.Real):
            raise ScoringFailure(f"{pair.place}: rule {self.path} returned {describe(value)}; return a number")
        number = float(value)
        if not abs(number) <= LARGEST_REWARD:  # so written, NaN is caught too
            raise ScoringFailure(
                f"{pair.place}: rule {self.path} returned {number}; return a finite number, at most {LARGEST_REWARD:g}"
            )
        return number


def find_function(path: str) -> Callable[[Any, str], Any]:
    """``module:function`` or ``module.function``; modules are looked for in the current folder first.

    Raises:
        UserError: no such module or function, or the module cannot be imported.
    """
    module, _, function = path.partition(":") if ":" in path else path.rpartition(".")
    if not module or not function:
        raise UserError(f"{path!r} is no import path; write module:function, such as {EXAMPLE}")
    with _current_folder_on_path():
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module}.".startswith(f"{error.name}."):
                raise UserError(
                    f"there is no module {error.name} (looked in {os.getcwd()} and in the installed packages); check "
                    "the name, or go to the folder it lies in"
                ) from None
            raise UserError(f"module {module} needs {error.name}, which is not installed") from None
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise UserError(f"module {module} cannot be imported ({type(error).__name__}: {error}); mend it") from None
    try:
        found = operator.attrgetter(function)(found)
    except AttributeError:
        file = found.__file__ or "built in"
        raise UserError(f"module {module} ({file}) has no {function}; check the name") from None
    if not callable(found):
        raise UserError(f"{path} is {describe(found)}; name a function of (prompt, response)")
    return found


def _source_digest(function: Callable[..., Any]) -> str | None:
    """Of the file that the function stands in; ``None`` where there is none to read."""
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


RULE = Kind(lambda path, _: RuleScorer(path), lambda path: path.replace(":", ".").split(".")[-1], "module:function")
