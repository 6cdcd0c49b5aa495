"""Argument parsing shared by all ``nemo-rao`` commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from nemo_rao.errors import UserError
from nemo_rao.other_names import counterpart


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, as the rest of the project does."""

    def error(self, message: str) -> NoReturn:
        what, _, options = message.partition("unrecognized arguments: ")
        if not what and options and (hint := counterpart(options.split()[0])) is not None:
            raise UserError(f"{message}; keys are set as key=value, without dashes, and {hint}")
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """One ``nemo-rao`` command.

    Attributes:
        name: name on the command line.
        summary: one-line description for the list of commands.
        parser: builds the argument parser.
        run: maps parsed arguments to an exit code.
    """

    name: str
    summary: str
    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]


def add_columns(parser: Parser, of_what: str) -> None:
    """Add the options that rename and ignore columns of a file.

    They are parsed into ``columns``, a mapping from our names to the file's, and ``ignore_fields``, a list.
    """
    parser.add_argument(
        "--column",
        action=_Columns,
        dest="columns",
        default={},
        metavar="OURS=THEIRS",
        help=f"name of a column in {of_what}, such as prompt=question (as data.columns)",
    )
    add_ignored(parser, of_what)


def add_ignored(parser: Parser, of_what: str) -> None:
    """Add the option that names fields to ignore."""
    parser.add_argument(
        "--ignore-field",
        action="append",
        dest="ignore_fields",
        default=[],
        metavar="NAME",
        help=f"field of {of_what} to ignore (as data.ignore_fields)",
    )


class _Columns(argparse.Action):
    """Add one OURS=THEIRS to the columns given so far."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        ours, _, theirs = values.partition("=")
        if not ours or not theirs:
            raise UserError(f"--column {values}: must be OURS=THEIRS, such as prompt=question.")
        columns = {ours: theirs} | getattr(namespace, self.dest)
        if columns[ours] != theirs:
            raise UserError(f"--column {values}: {ours} is already set to {columns[ours]}. Remove one of them.")
        setattr(namespace, self.dest, columns)


def add_recipe(parser: Parser, of_what: str = "") -> None:
    """Add the options that name a recipe; ``of_what``: further contents of its directory, for the help text."""
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help=f"directory with your own recipes{of_what}, searched first")
