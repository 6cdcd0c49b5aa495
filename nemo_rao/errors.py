"""Errors for users, and how entry points report them. Any other exception is a bug."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Invalid input: one line with the file, row or key, what is wrong, and what to do.

    Entry points print the line and exit with code 2, before anything heavy starts.
    """


@contextlib.contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Prefix each :class:`UserError` with the file, key or run that it is about, unless ``where`` is empty."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The known name that was probably meant, or ``None`` if none is similar.

    Args:
        cutoff: least similarity, from 0 to 1, in the sense of :class:`difflib.SequenceMatcher`.
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=cutoff)
    # First names that end in this one (gpt_ppo for ppo), then those with the same letters in another order.
    near.sort(key=lambda other: (not other.endswith(f"_{name}"), sorted(other) != sorted(name)))
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "", cutoff: float = 0.5) -> str:
    """The end of a message about an unknown name: ``; did you mean NEAREST?``, or ``otherwise`` if none is similar."""
    near = nearest(name, known, cutoff=cutoff)
    return otherwise if near is None else f"; did you mean {near}?"


class RankFailure(RuntimeError):
    """A rank of a run failed. The message is its traceback, or names the signal that killed it."""


def report(error: UserError | RankFailure) -> int:
    """Print an error to stderr, invalid input in one line. Returns the exit code: 2 for input, 1 for a rank."""
    said = " ".join(str(error).split()) if isinstance(error, UserError) else str(error)
    print(f"error: {said}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1
