"""``nemo-rao show``: display data as it will be trained on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nemo_rao.config.checks import check_keys_are_read, check_sources
from nemo_rao.config.compose import compose
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically
from nemo_rao.show.inspection import inspect
from nemo_rao.show.page import MARK, page
from nemo_rao.show.rows import MOST_TOKENS
from nemo_rao.show.terminal import Writer, can_show_color, terminal_width

DEFAULT_ROWS = 3


def main(arguments: argparse.Namespace) -> int:
    """Print how a recipe interprets its data, and write the HTML page if requested.

    Raises:
        UserError: the recipe or an option is invalid, or training would reject the data.
    """
    overrides = list(arguments.overrides)
    if (file := arguments.file) is not None and "=" in file and not os.path.exists(file):
        overrides.insert(0, file)  # no file is given: use the recipe's data.train_path
        file = None
    config = compose(arguments.config_name, overrides, arguments.config_dir)
    check_keys_are_read(overrides, config)
    if file is not None:
        config.data.train_path = file
    check_sources(config)
    if arguments.rows is not None and arguments.rows < 0:
        raise UserError(f"--rows {arguments.rows}: must be at least 0")
    if arguments.first is not None and arguments.first < 1:
        raise UserError(f"--first {arguments.first}: must be at least 1")
    output = None if arguments.output is None else Path(arguments.output).expanduser()
    if output is not None:
        _check_output(output)
    num_rows = arguments.rows
    if num_rows is None:
        num_rows = 0 if arguments.row else DEFAULT_ROWS
    seen = inspect(
        config,
        arguments.config_name,
        num_rows=num_rows,
        row_numbers=arguments.row,
        first=arguments.first,
        most_tokens=None if arguments.full else MOST_TOKENS,
    )
    writer = Writer(color=can_show_color(), width=terminal_width(), full=arguments.full)
    encoding = sys.stdout.encoding or "utf-8"
    for line in writer.lines(seen):
        print(line.encode(encoding, "replace").decode(encoding))
    if output is not None:
        write_atomically(output, page(seen))
        print(f"\npage: {output}")
    return 0


def _check_output(path: Path) -> None:
    """Reject a path that cannot be written, or a file that was not written by this command."""
    if path.is_dir():
        raise UserError(f"--output {path}: is a directory. Pass a file, such as {path / 'page.html'}.")
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(1000):
                raise UserError(f"--output {path}: exists and was not written by nemo-rao show. Pass another file.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {path}: {parent} is not a writable directory. Pass another file.")
