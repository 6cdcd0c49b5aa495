"""The command ``nemo-rao``. Nothing but the standard library is imported until a command has been read.

Exit codes: 0 done; 1 a rank failed, its traceback on stderr, or scoring failed or a loss was not finite, in one line; 2
invalid input, in one line on stderr, nothing written; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from nemo_rao import __version__
from nemo_rao.commands import about, inspection, models, rewards, training
from nemo_rao.commands.parser import Command, Parser
from nemo_rao.errors import RankFailure, UserError, did_you_mean, report
from nemo_rao.other_names import command_hint
from nemo_rao.runtime.malloc import ask_for_huge_pages

COMMANDS: dict[str, Command] = {
    command.name: command for part in (inspection, training, models, rewards, about) for command in part.COMMANDS
}


def command_parser() -> Parser:
    listing = "\n".join(f"  {name:17}{command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="nemo-rao",
        description="Align Megatron GPT models with explicit rewards.",
        epilog=f"commands:\n{listing}\n\nRun nemo-rao COMMAND --help for the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nemo-rao {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    ask_for_huge_pages()
    try:
        given = command_parser().parse_args(argv)
        command = _command(given.command)
        return command.run(command.parser().parse_intermixed_args(given.arguments))
    except (UserError, RankFailure) as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _command(name: str) -> Command:
    if name not in COMMANDS:
        hint = command_hint(name)
        raise UserError(
            f"nemo-rao {name}: no such command"
            + (did_you_mean(name, COMMANDS, otherwise=".") if hint is None else f"; {hint}.")
            + f" The commands are {', '.join(COMMANDS)}."
        )
    return COMMANDS[name]


if __name__ == "__main__":
    sys.exit(main())
