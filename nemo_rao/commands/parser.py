"""Parts shared by all commands of ``nemo-rao``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nemo_rao.errors import UserError
from nemo_rao.other_names import counterpart


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, like all other errors of the project."""

    def error(self, message: str) -> NoReturn:
        what, _, options = message.partition("unrecognized arguments: ")
        if not what and options and (hint := counterpart(options.split()[0])) is not None:
            raise UserError(f"{message}; keys are set as key=value, without dashes, and {hint}")
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: of the command on the command line.
        summary: one line for the list of commands.
        parser: creates the parser of its arguments.
        run: arguments -> exit code.
    """

    name: str
    summary: str
    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]


def add_columns(parser: Parser, of_what: str) -> None:
    """The options that say which column of a file is what, and which are not wanted; see :func:`columns_of`."""
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help=f"name of a column in {of_what}, such as prompt=question (as data.columns)",
    )
    add_ignored(parser, of_what)


def add_ignored(parser: Parser, of_what: str) -> None:
    """Add the option that names fields to ignore."""
    parser.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help=f"field of {of_what} to ignore (as data.ignore_fields)",
    )


def columns_of(given: Sequence[str]) -> dict[str, str]:
    """Our name of a column -> its name in the file.

    Raises:
        UserError: one is not OURS=THEIRS, or a column has two names.
    """
    columns: dict[str, str] = {}
    for text in given:
        ours, _, theirs = text.partition("=")
        if not ours or not theirs:
            raise UserError(f"--column {text}: must be OURS=THEIRS, such as prompt=question")
        if columns.setdefault(ours, theirs) != theirs:
            raise UserError(f"--column {text}: {ours} is {columns[ours]} already; leave one of them out")
    return columns


def add_recipe(parser: Parser, of_what: str = "") -> None:
    """Add the options that name a recipe; ``of_what``: further contents of its directory, for the help text."""
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help=f"directory with your own recipes{of_what}, searched first")
