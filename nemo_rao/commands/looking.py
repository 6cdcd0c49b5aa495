"""A look at data before the first training."""

from __future__ import annotations

import argparse

from nemo_rao.commands.parser import Command, Parser, add_recipe


def show_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao show",
        description="Show data as a recipe will train on it: some rows with their tokens by prompt, response and what "
        "is not learned, their rewards, what is chosen and rejected, and what is left out; how many rows are dropped "
        "and why, with the first of each reason; lengths and rewards of all rows. Data is loaded as in training, and "
        "no model is needed.",
        epilog="example: nemo-rao show prefs.jsonl --config-name gpt_rao data.tokenizer=./tokenizer --output page.html",
        allow_abbrev=False,
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a file, pattern or data set, as data.train_path takes it (default: the recipe's data.train_path)",
    )
    add_recipe(parser)
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="rows to show, spread evenly over those that are trained on (default: 3; with --row 0)",
    )
    parser.add_argument(
        "--row",
        type=int,
        action="append",
        default=[],
        metavar="LINE",
        help="show the row at this line of the file, dropped or not; may be given several times",
    )
    parser.add_argument(
        "--first", type=int, metavar="N", help="read the first N rows of the training data alone: a quick look at much"
    )
    parser.add_argument("--full", action="store_true", help="do not shorten long texts on the terminal")
    parser.add_argument(
        "--output", metavar="PAGE.html", help="also write a page with all of it, and the rows token by token"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def show(arguments: argparse.Namespace) -> int:
    from nemo_rao.show.command import main as run

    return run(arguments)


COMMANDS = (Command("show", "show data as it will be trained on, before the first training", show_parser, show),)
