"""What all commands of ``nemo-rao`` are made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from nemo_rao.errors import UserError
from nemo_rao.other_names import counterpart


class Parser(argparse.ArgumentParser):
    """Refuses in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        what, _, options = message.partition("unrecognized arguments: ")
        if not what and options and (hint := counterpart(options.split()[0])) is not None:
            raise UserError(f"{message}; keys are set as key=value, without dashes, and {hint}")
        raise UserError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: as it is typed.
        summary: a line of the list of commands.
        parser: makes the parser of its arguments.
        run: arguments -> exit code.
    """

    name: str
    summary: str
    parser: Callable[[], Parser]
    run: Callable[[argparse.Namespace], int]


def add_recipe(parser: Parser, of_what: str = "") -> None:
    """The options that name a recipe; ``of_what`` else the folder of recipes holds."""
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help=f"folder of your own recipes{of_what}, looked into first")
