"""The command ``nemo-rao``. Nothing but the standard library is imported until a command has been read.

Exit codes: 0 done; 1 a rank failed, its traceback on stderr; 2 input that cannot be used, told in one line on stderr,
nothing written; 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from nemo_rao import __version__
from nemo_rao.errors import RankFailure, UserError, report


class Parser(argparse.ArgumentParser):
    """Refuses in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def train_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao train",
        description="Train a model with the objective and the data that a recipe names.",
        epilog="example: nemo-rao train --config-name gpt_rao data.train_path=prefs.jsonl data.tokenizer=./tokenizer "
        "trainer.max_steps=100",
        allow_abbrev=False,
    )
    parser.add_argument("--config-name", default="gpt_rao", metavar="NAME", help="recipe (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes, looked into first")
    parser.add_argument(
        "--print-config", action="store_true", help="print the full recipe, each key with its comment, and stop"
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="train a grid of runs, one after the other: keys with several values, such as model.dpo.beta=0.05,0.1, or "
        "a published grid, search=dpo; with --print-config, list them",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a key of the recipe, or a group such as model=llama3_8b"
    )
    return parser


def train(arguments: argparse.Namespace) -> int:
    if arguments.multirun:
        return train_grid(arguments)
    from nemo_rao.integration.compose import compose, to_yaml

    config = compose(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0
    from nemo_rao.integration.checks import check_run

    check_run(config)
    from nemo_rao.integration.train import train as run

    run(config)
    return 0


def train_grid(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.sweep import check, plan, run_sweep

    sweep = plan(arguments.config_name, arguments.overrides, arguments.config_dir)
    if arguments.print_config:
        for run in sweep.runs:
            print(run.name, *run.overrides)
        return 0
    check(sweep)
    return run_sweep(sweep)


def demo_parser() -> Parser:
    parser = Parser(
        prog="nemo-rao demo",
        description="Fine-tune a small Llama on this machine's CPU with four ranks (TP 2 x PP 2), align it with RAO on "
        "preferences made on the spot, and compare it with its start.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of results (default: %(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe, for both parts of the demonstration"
    )
    return parser


def demo(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.demo import main as run

    return run(arguments) or 0


def objectives_parser() -> Parser:
    return Parser(
        prog="nemo-rao objectives",
        description="Print every objective with its formula, needs, keys and source, as Markdown.",
        allow_abbrev=False,
    )


def objectives(arguments: argparse.Namespace) -> int:
    from nemo_rao.integration.objectives_page import page

    print(page(), end="")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[], Parser], Callable[[argparse.Namespace], int]]] = {
    "train": ("train a model from a recipe", train_parser, train),
    "objectives": ("print the objectives, their formulas and keys", objectives_parser, objectives),
    "demo": ("fine-tune and align a small model on this machine, and compare", demo_parser, demo),
}


def command_parser() -> Parser:
    listing = "\n".join(f"  {name:12}{summary}" for name, (summary, _, _) in COMMANDS.items())
    parser = Parser(
        prog="nemo-rao",
        description="Align Megatron GPT models with explicit rewards.",
        epilog=f"commands:\n{listing}\n\nnemo-rao COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nemo-rao {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    try:
        given = command_parser().parse_args(argv)
        _, parser, run = COMMANDS[given.command]
        return run(parser().parse_intermixed_args(given.arguments))
    except (UserError, RankFailure) as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
