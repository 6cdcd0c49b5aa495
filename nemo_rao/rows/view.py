"""A view of a record that tracks which of its fields are read, so that unused ones can be reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.rows.fields import describe, missing, read_records

# Fields that some format reads, and that `columns` may provide.
KNOWN_FIELDS = (
    *("prompt", "question", "query", "instruction", "input", "history", "system", "tools", "documents"),
    *("messages", "conversations", "responses", "completions", "chosen", "rejected", "response", "completion"),
    *("chosen_response", "rejected_response", "chosen_reward", "rejected_reward", "score_chosen", "score_rejected"),
    *("reward", "label", "helpfulness", "ranked", "reference_rewards", "reasoning_content", "tool_calls", "weight"),
    *("truncated", "chat_template_kwargs"),
)


@dataclass(frozen=True)
class Columns:
    """Names of a file's fields, and which of them to ignore.

    Attributes:
        columns: canonical field name -> name in the file.
        ignore_fields: fields to skip: names, or paths as returned by :meth:`View.left` (``completions[].model``).
        rewards: the user's names of rewards, which ``columns`` may also provide.

    Raises:
        UserError: a name is empty, or no format reads the field that ``columns`` would provide.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    ignore_fields: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for ours, theirs in self.columns.items():
            if not isinstance(theirs, str) or not theirs:
                raise UserError(f"data.columns.{ours} is {theirs!r}. It must be the name of a field of the file.")
            if ours not in KNOWN_FIELDS and ours not in self.rewards:
                near = did_you_mean(ours, KNOWN_FIELDS, otherwise=".")
                raise UserError(
                    f"data.columns.{ours}: no data format reads this field{near} Allowed fields are "
                    f"{', '.join(KNOWN_FIELDS)}."
                )
        if not all(isinstance(name, str) and name for name in self.ignore_fields):
            raise UserError(f"data.ignore_fields={list(self.ignore_fields)} must be a list of field names")

    def view(self, record: object, location: str) -> View:
        """View of the record under canonical names, without ignored fields.

        Raises:
            UserError: it is not an object, it lacks a field named by ``columns``, or the file has another field with
                the canonical name that ``columns`` provides.
        """
        if not isinstance(record, Mapping):
            raise UserError(
                f"{location}: expected an object with named fields, found {describe(record)}. "
                "Write one JSON object per line (JSON Lines, not one JSON array)."
            )
        fields = {str(name): value for name, value in record.items() if name not in self.ignore_fields}
        renamed = {}
        for ours, theirs in self.columns.items():
            if theirs not in fields:
                found = ", ".join(fields) or "none"
                raise UserError(
                    f"{location}: field '{theirs}', which data.columns names for '{ours}', is missing "
                    f"(fields found: {found}). Correct data.columns or drop the row."
                )
            renamed[ours] = fields[theirs]
        others = {name: value for name, value in fields.items() if name not in self.columns.values()}
        for ours, theirs in self.columns.items():
            if others.get(ours) is not None:
                raise UserError(
                    f"{location}: the file has a field '{ours}' besides '{theirs}', which data.columns reads instead. "
                    f"Add {ours} to data.ignore_fields, or name it in data.columns too."
                )
        paths = frozenset(name for name in self.ignore_fields if "." in name or "[]" in name)
        return View(others | renamed, location, ignored=paths)


class View(Mapping[str, Any]):
    """View of an object in a record. A field counts as read once it is looked up; null fields count as missing.

    Attributes:
        location: location of the record, for messages.
        path: path of this object in the record, ``responses[3]``; empty for the record itself.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        location: str,
        path: str = "",
        kind: str | None = None,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        self.location = location
        self.path = path
        self._kind = path if kind is None else kind  # the path without numbers, responses[]
        self._ignored = ignored
        self._nulls = [str(name) for name, value in record.items() if value is None]
        self._fields = {str(name): value for name, value in record.items() if value is not None}
        if ignored:
            self._fields = {n: value for n, value in self._fields.items() if self._general(n) not in ignored}
        self._taken: set[str] = set()
        self._children: list[View] = []

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        self._taken.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def peek(self, name: str) -> Any:
        """The field's value or ``None``, without marking it as read."""
        return self._fields.get(name)

    def is_null(self, name: str) -> bool:
        return name in self._nulls

    def path_of(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def _general(self, name: str) -> str:
        return f"{self._kind}.{name}" if self._kind else name

    def required(self, name: str) -> Any:
        """The field's value. Raises if it is missing."""
        if name not in self:
            remedy = "Add it" if self.path else f"Add it, name the one that holds it (data.columns.{name}=NAME),"
            found = [*self._fields, *self._nulls]
            raise missing(self.path_of(name), self.is_null(name), found, self.location, remedy)
        return self[name]

    def inside(self, name: str) -> View:
        """View of a field that is an object."""
        return self.child(self[name], name)

    def child(self, value: Mapping[str, Any], name: str, number: int | None = None) -> View:
        """View of an object in the field: the field itself, or entry ``number`` of its list."""
        at, kind = ("", "") if number is None else (f"[{number}]", "[]")
        child = View(value, self.location, self.path_of(name) + at, self._general(name) + kind, self._ignored)
        self._children.append(child)
        return child

    def records(self, name: str) -> list[View]:
        """Views of the objects in a list."""
        records = read_records(self.required(name), self.location, self.path_of(name))
        return [self.child(record, name, number) for number, record in enumerate(records)]

    def unread(self) -> dict[str, Any]:
        """Fields of this object that were not looked up."""
        return {name: value for name, value in self._fields.items() if name not in self._taken}

    def left(self) -> tuple[str, ...]:
        """Paths of the fields that were not looked up, in this object and nested ones, without duplicates."""
        own = [self._general(name) for name in self.unread()]
        return tuple(dict.fromkeys([*own, *(path for child in self._children for path in child.left())]))
