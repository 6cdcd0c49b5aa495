"""What a command calls the keys of a recipe's ``data`` in messages about rows.

Reading and rendering name these keys as training does: "... that it is not wanted (data.ignore_fields=[source])". A
command with options in their place passes all such messages through its table: "... (--ignore-field source)".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nemo_rao.errors import UserError

_KEY = re.compile(
    r"(?<![\w./-])data\.(?P<key>[a-z_]+)"
    r"(?:(?<=columns)\.(?P<name>\w+))?"  # data.columns.prompt
    r"(?:=(?P<value>\[[^]]*\]|\w+))?"
    r"(?!\.\w)"  # a file's name, data.columns.jsonl
)
_ADD_TO_LIST = re.compile(r"\badd (\S+) to (data\.\w+)")

# Options that read rows, whatever the command.
READING = {"columns": "--column", "ignore_fields": "--ignore-field"}


@dataclass(frozen=True)
class OptionNames:
    """The names that one command has for keys of ``data``.

    Attributes:
        options: key -> option, or whatever the user sets instead; ``{name}`` in it stands for the column's name. Keys
            that are not in it belong to training, and stay as they are.
        phrases: remedies that this command words otherwise; replaced first.
    """

    options: Mapping[str, str]
    phrases: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        """The text with the command's own names in it."""
        for ours, theirs in self.phrases.items():
            text = text.replace(ours, theirs)
        return _KEY.sub(self._option, _ADD_TO_LIST.sub(r"give \2=[\1]", text))

    def _option(self, match: re.Match[str]) -> str:
        option, name, value = self.options.get(match["key"]), match["name"], match["value"]
        if option is None:
            return match[0]
        if "{name}" in option:
            return option.format(name=name)
        if name is not None:
            return f"{option} {name}" + ("" if value is None else f"={value}")
        values = [] if value is None else value.strip("[]").split(",")
        return " ".join(f"{option} {one.strip()}" for one in values) or option

    @contextlib.contextmanager
    def in_errors(self) -> Iterator[None]:
        """The same for errors about the user's input."""
        try:
            yield
        except UserError as error:
            raise UserError(self(str(error))) from error
