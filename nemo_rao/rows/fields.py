"""Typed fields of a record. Errors are one line with the record's location, the field and what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_rao.errors import UserError

Record = Mapping[str, Any]
Messages = tuple[Mapping[str, Any], ...]

# Rewards reach the loss in float32, whose maximum is 3.4e38. Losses square them, gradients are proportional to them,
# and a gradient norm sums squares over up to 10^12 weights: 1e12 squared, times 1e12, still fits into float32.
LARGEST_REWARD = 1e12


def describe(value: object) -> str:
    """Describe a value for a message: its kind, and its beginning if that helps."""
    kinds = {type(None): "null", bool: "a boolean", str: "text", dict: "an object", list: "a list"}
    kind = "a number" if type(value) in (int, float) else kinds.get(type(value), f"a {type(value).__name__}")
    if value is None or isinstance(value, (dict, list)):
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def required(record: Record, name: str, location: str, inside: str | None = None) -> Any:
    if record.get(name) is None:
        raise missing(name if inside is None else f"{inside}.{name}", name in record, record, location)
    return record[name]


def missing(path: str, is_null: bool, found: Iterable[str], location: str, remedy: str = "Add it") -> UserError:
    """The error for a missing required field."""
    names = ", ".join(map(str, found)) or "none"
    state = "null" if is_null else "missing"
    return UserError(f"{location}: field '{path}' is {state} (fields found: {names}). {remedy} or drop the row.")


def read_text(value: object, location: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{location}: field '{field}' must be text, found {describe(value)}")
    if not value or value.isspace():
        raise UserError(f"{location}: field '{field}' is empty. Drop the row or fill it in.")
    return check_unicode(value, location, field)


def check_unicode(value: str, location: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{location}: field '{field}' contains half a surrogate pair at character {error.start}, which is not "
            "text. Rewrite the file as UTF-8."
        ) from None
    return value


def is_json(value: object) -> bool:
    """Whether JSON can represent the value: column stores also hold dates and bytes."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_json(value: object, location: str, field: str) -> None:
    """Reject values that cannot be passed to a chat template: dates, bytes, half surrogate pairs."""
    if not is_json(value):
        raise UserError(
            f"{location}: field '{field}' holds values that JSON cannot represent, such as dates. Drop them."
        )
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: field '{field}' contains half a surrogate pair, which is not text. Rewrite the file as UTF-8."
        ) from None


def read_records(value: object, location: str, field: str) -> Sequence[Record]:
    """Read a list of objects. An object of lists, as column stores may give, is transposed."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{location}: field '{field}' has lists of different lengths: {lengths}")
        value = [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{location}: field '{field}' must be a list of objects, found {describe(value)}")
    if not value:
        raise UserError(f"{location}: field '{field}' is empty. Drop the row or give it at least one response.")
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise UserError(f"{location}: field '{field}[{number}]' must be an object, found {describe(entry)}")
    return value


def read_numbers(value: object, location: str, field: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{location}: field '{field}' must be a list of numbers, found {describe(value)}")
    numbers: list[float] = []
    for at, entry in enumerate(value):
        number = read_number(entry, location, f"{field}[{at}]")
        if number is None:
            raise UserError(f"{location}: field '{field}[{at}]' is null. Drop it, or leave '{field}' out.")
        numbers.append(number)
    return tuple(numbers)


def read_number(value: object, location: str, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{location}: field '{field}' must be a number, found {describe(value)}")
    if not _is_finite(value):
        raise UserError(f"{location}: field '{field}' must be a finite number, found {describe(value)}")
    if abs(value) > LARGEST_REWARD:
        raise UserError(
            f"{location}: field '{field}' is {value:g}, but squared errors and gradients above {LARGEST_REWARD:g} "
            "overflow float32. Scale the rewards (nemo-rao score --standardize global), or drop the row."
        )
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False
