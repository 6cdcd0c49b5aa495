"""Inspection commands: data before training, a run afterwards."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_recipe


def show_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao show",
        description="Show data as a recipe will train on it: some rows token by token (prompt, response, tokens "
        "without loss), with rewards, chosen and rejected responses, and those left out; how many rows are dropped, "
        "by reason, with the first row of each; lengths and rewards of all rows. Data is loaded as in training. No "
        "model is needed.",
        epilog="example: nemo-rao show prefs.jsonl --config-name gpt_rao data.tokenizer=./tokenizer --output page.html",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="file, pattern or data set, in any form of data.train_path (default: the recipe's data.train_path)",
    )
    add_recipe(parser)
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="number of rows to show, evenly spaced over the training rows (default: 3, or 0 with --row)",
    )
    parser.add_argument(
        "--row",
        type=int,
        action="append",
        default=[],
        metavar="LINE",
        help="show the row at this line of the file, dropped or not; can be repeated",
    )
    parser.add_argument("--first", type=int, metavar="N", help="read only the first N rows of the training data")
    parser.add_argument("--full", action="store_true", help="do not shorten long texts")
    parser.add_argument(
        "--output", metavar="PAGE.html", help="also write an HTML page with the same content and the id of each token"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def show(arguments: argparse.Namespace) -> int:
    from nemo_rao.show.command import main as run

    return run(arguments)


def report_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao report",
        description="Write a page about one run: settings, data, metrics, curves and samples, as HTML and Markdown. "
        "For several runs with several seeds, see nemo-rao study.",
        epilog="example: nemo-rao report runs/gpt_rao",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="directory of a run, finished or not")
    parser.add_argument(
        "--output", metavar="PAGE.html", help="page to write, with a .md beside it (default: RUN/report.html)"
    )
    return parser


def report(arguments: argparse.Namespace) -> int:
    from nemo_rao.study.command import report_run

    return report_run(arguments)


COMMANDS = (
    Command("show", "show data as it will be trained on", show_parser, show),
    Command("report", "write a page about a run", report_parser, report),
)
