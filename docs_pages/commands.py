"""docs/reference/commands.md: every command of ``nemo-rao``, from the argument parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from nemo_rao.cli import COMMANDS
from nemo_rao.commands.parser import Command

_BEFORE = """\
# Commands

`nemo-rao COMMAND --help` prints the same information. Exit codes: 0, success; 1, a rank failed, a loss was not finite,
or scoring failed; 2, invalid input, reported in one line before anything is written; 130, interrupted. This page is
generated from the argument parsers by `python -m docs_pages`.
"""


def page() -> str:
    lines = [_BEFORE, "| command | |\n|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {command.summary} |" for name, command in COMMANDS.items()]
    for command in COMMANDS.values():
        lines += ["", *_section(command)]
    return "\n".join(lines) + "\n"


def _section(command: Command) -> Iterator[str]:
    parser = command.parser()
    yield f"## {command.name}\n"
    yield f"```text\n{_usage(parser)}\n```\n"
    yield f"{parser.description}\n"
    rows = [_row(action, parser) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if rows:
        yield "| argument | meaning |\n|---|---|"
        yield "\n".join(rows)
    if parser.epilog and parser.epilog.startswith("example: "):
        yield f"\n```text\n{parser.epilog.removeprefix('example: ')}\n```"


def _usage(parser: argparse.ArgumentParser) -> str:
    """Arguments and required options; argparse's own usage depends on the width of the terminal."""
    options, positional = [], []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if action.option_strings:
            text = f"{action.option_strings[-1]} {action.metavar}" if action.metavar else action.option_strings[-1]
            if action.required:
                options.append(text)
        else:
            name = str(action.metavar or action.dest)
            positional.append({"*": f"[{name} ...]", "+": f"{name} ...", "?": f"[{name}]"}.get(str(action.nargs), name))
    return " ".join([parser.prog, *positional, *options, "[options]"])


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if action.option_strings and action.nargs != 0:
        value = action.metavar or (
            "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
        )
        names = ", ".join(f"`{name} {value}`" for name in action.option_strings)
    help_text = (action.help or "") % {**vars(action), "prog": parser.prog}
    required = " (required)" if action.option_strings and action.required else ""
    return "| " + " | ".join(text.replace("|", "\\|") for text in (names, help_text + required)) + " |"
