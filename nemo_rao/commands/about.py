"""What there is: objectives, and what works on a machine."""

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
        description="Tell what is installed here, whether it can be imported, and what works and what does not and "
        "why. Exit code 0: training works here, 1: it does not.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="also write it there")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds of each import (default: %(default)s)"
    )
    return parser


def doctor(arguments: argparse.Namespace) -> int:
    from nemo_rao.doctor.command import main as run

    return run(arguments)


COMMANDS = (
    Command("objectives", "print the objectives, their formulas and keys", objectives_parser, objectives),
    Command("doctor", "tell what works on this machine, and what does not", doctor_parser, doctor),
)
