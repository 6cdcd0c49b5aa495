"""The errors that speak to users, and how entry points tell them. Everything else that raises is a mistake of ours."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Input that cannot be used: one line that names the place (file, row or key) and the remedy.

    Entry points print the line and exit with code 2, before anything heavy starts.
    """


@contextlib.contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Prefixes a :class:`UserError` with the file, key or run it is about, if there is one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a line about an unknown name: ``; did you mean NEAREST?``, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class RankFailure(RuntimeError):
    """A rank of a run died. The message is what to show: its traceback, or the signal that killed it."""


def report(error: UserError | RankFailure) -> int:
    """Tells on stderr what stopped a run. Returns the exit code: 2, in one line, for input; 1 for a rank."""
    said = " ".join(str(error).split()) if isinstance(error, UserError) else str(error)
    print(f"error: {said}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1
