"""Information commands: the objectives, and what works on this machine."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser


def objectives_parser() -> Parser:
    return Parser(
        prog="nemo-rao objectives",
        description="Print every objective with its formula, needs, keys and source, as Markdown.",
        allow_abbrev=False,
    )


def objectives(arguments: argparse.Namespace) -> int:
    from nemo_rao.config.objectives_page import page

    print(page(), end="")
    return 0


def doctor_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao doctor",
        description="Report which packages are installed and can be imported, and which features work on this machine, "
        "with the reason for those that do not. Exit code 0: training works, 1: it does not.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to this file")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="time limit of each import, in seconds (default: %(default)s)",
    )
    return parser


def doctor(arguments: argparse.Namespace) -> int:
    from nemo_rao.doctor.command import main as run

    return run(arguments)


COMMANDS = (
    Command("objectives", "print the objectives with their formulas and keys", objectives_parser, objectives),
    Command("doctor", "report which features work on this machine, and why the others do not", doctor_parser, doctor),
)
