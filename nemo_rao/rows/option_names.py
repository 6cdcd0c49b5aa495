"""Translation of ``data`` keys in messages about rows to a command's own options.

Reading and rendering use the names of the keys in recipes: "... or ignore it (data.ignore_fields=[source])". A command
with options instead translates all such messages by its table: "... or ignore it (--ignore-field source)".
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
    r"(?!\w|\.\w)"  # neither a part of a name nor a file name, data.answers.json
)
_ADD_TO_LIST = re.compile(r"\b([Aa])dd (\S+) to (data\.\w+)")

# Options for reading rows, shared by all commands.
READING = {"columns": "--column", "ignore_fields": "--ignore-field"}


@dataclass(frozen=True)
class OptionNames:
    """One command's names for keys of ``data``.

    Attributes:
        options: key -> option or other setting; ``{name}`` in it is replaced by the column's name. Keys that are not
            listed belong to training and are left unchanged.
        phrases: replacements for remedies that do not apply to this command; applied first.
    """

    options: Mapping[str, str]
    phrases: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        """Translate the keys in ``text``."""
        for ours, theirs in self.phrases.items():
            text = text.replace(ours, theirs)
        return _KEY.sub(self._option, _ADD_TO_LIST.sub(_as_assignment, text))

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
        """Translate the messages of :class:`UserError` raised in the block."""
        try:
            yield
        except UserError as error:
            raise UserError(self(str(error))) from error


def _as_assignment(match: re.Match[str]) -> str:
    verb = "Pass" if match[1] == "A" else "pass"
    return f"{verb} {match[3]}=[{match[2]}]"
