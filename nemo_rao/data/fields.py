"""Typed fields of a record, or one line that says where the record is and what is wrong with which field."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rao.batch import Response
from nemo_rao.errors import UserError

Record = Mapping[str, Any]
Messages = tuple[Mapping[str, Any], ...]

RewardField = str | Sequence[str] | None  # a name, the names of an ensemble, or the format's own

# Rewards reach the loss in float32, which ends at 3.4e38. Losses square them, gradients are proportional to them, and
# a gradient's norm adds up squares over up to 10^12 weights: 1e12 squared, times 1e12, still is a float32.
LARGEST_REWARD = 1e12


def describe(value: object) -> str:
    """A value for a message: its kind, and its beginning where that helps."""
    kinds = {type(None): "null", bool: "a boolean", str: "text", dict: "an object", list: "a list"}
    kind = "a number" if type(value) in (int, float) else kinds.get(type(value), f"a {type(value).__name__}")
    if value is None or isinstance(value, (dict, list)):
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def required(record: Record, name: str, place: str, inside: str | None = None) -> Any:
    if record.get(name) is None:
        full = name if inside is None else f"{inside}.{name}"
        state = "null" if name in record else "missing"
        found = ", ".join(str(key) for key in record) or "none"
        raise UserError(f"{place}: field '{full}' is {state} (fields found: {found}); add it or drop the row")
    return record[name]


def read_text(value: object, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: field '{field}' must be text, found {describe(value)}")
    if not value or value.isspace():
        raise UserError(f"{place}: field '{field}' is empty; drop the row or fill it in")
    return _unicode(value, place, field)


def _unicode(value: str, place: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: field '{field}' holds half a surrogate pair at character {error.start}, which is not text; "
            "write the file anew as UTF-8"
        ) from None
    return value


def read_prompt(value: object, place: str, field: str) -> str | Messages:
    if isinstance(value, str):
        return read_text(value, place, field)
    messages = read_messages(value, place, field)
    last = messages[-1]
    read_text(last["content"], place, f"{field}[{len(messages) - 1}].content")
    if last["role"] == "assistant":
        raise UserError(
            f"{place}: field '{field}' ends with an assistant message; a prompt ends with the message to be answered"
        )
    return messages


def read_messages(value: object, place: str, field: str) -> Messages:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{place}: field '{field}' must be text or a list of messages, found {describe(value)}")
    if not value:
        raise UserError(f"{place}: field '{field}' is empty; drop the row or fill it in")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{place}: field '{field}[{number}]' must be a message with role and content, found {describe(message)}"
            )
        kept = {str(name): entry for name, entry in message.items() if entry is not None}  # Parquet fills with null
        for name in ("role", "content"):
            entry = required(kept, name, place, f"{field}[{number}]")
            if not isinstance(entry, str):
                raise UserError(f"{place}: field '{field}[{number}].{name}' must be text, found {describe(entry)}")
            _unicode(entry, place, f"{field}[{number}].{name}")
        messages.append(kept)
    return tuple(messages)


def read_records(value: object, place: str, field: str) -> Sequence[Record]:
    """A list of objects. A column store may give an object of lists instead, which is turned round."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {name: len(column) for name, column in value.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{place}: field '{field}' has lists of different lengths: {lengths}")
        value = [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{place}: field '{field}' must be a list of objects, found {describe(value)}")
    if not value:
        raise UserError(f"{place}: field '{field}' is empty; drop the row or give it at least one response")
    for number, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise UserError(f"{place}: field '{field}[{number}]' must be an object, found {describe(entry)}")
    return value


def read_rewarded(
    record: Record, content: str, default: str, chosen: RewardField, place: str, inside: str | None = None
) -> Response:
    """A response with its reward: under the format's own name, or under the user's; several names are an ensemble.

    A member of an ensemble may be null, which is NaN; the reward is the mean of the others. Where the format's own name
    is not there, ``label``: true is a reward of 1, false of 0.
    """
    if chosen is not None and not isinstance(chosen, str):
        columns = [_chosen_reward(record, name, place, inside, may_be_null=True) for name in chosen]
        known = [reward for reward in columns if reward is not None]
        ensemble = tuple(math.nan if reward is None else reward for reward in columns)
        return Response(content, sum(known) / len(known) if known else None, ensemble)
    if isinstance(chosen, str):
        return Response(content, _chosen_reward(record, chosen, place, inside))
    if record.get(default) is None and record.get("label") is not None:
        return Response(content, _read_label(record["label"], place, "label" if inside is None else f"{inside}.label"))
    field = default if inside is None else f"{inside}.{default}"
    return Response(content, read_number(record.get(default), place, field))


def _read_label(value: object, place: str, field: str) -> float:
    if value in (0, 1) and isinstance(value, (bool, int)):
        return float(value)
    raise UserError(f"{place}: field '{field}' must be true or false, found {describe(value)}")


def _chosen_reward(
    record: Record, chosen: str, place: str, inside: str | None, may_be_null: bool = False
) -> float | None:
    """The reward under the user's name, which may be a path and must be there."""
    value: Any = record
    for name in [chosen] if chosen in record else chosen.split("."):
        if may_be_null and isinstance(value, Mapping) and name in value and value[name] is None:
            return None
        if not isinstance(value, Mapping):
            raise UserError(f"{place}: reward field '{chosen}' leads into {describe(value)}; name another reward field")
        value = required(value, name, place, inside)
        inside = name if inside is None else f"{inside}.{name}"
    if chosen.endswith(".Rating") and isinstance(value, str):  # UltraFeedback publishes its ratings as text
        with contextlib.suppress(ValueError):
            value = None if value == "N/A" else float(value)
    return read_number(value, place, inside or chosen)


def read_numbers(value: object, place: str, field: str) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{place}: field '{field}' must be a list of numbers, found {describe(value)}")
    numbers: list[float] = []
    for at, entry in enumerate(value):
        number = read_number(entry, place, f"{field}[{at}]")
        if number is None:
            raise UserError(f"{place}: field '{field}[{at}]' is null; drop it, or leave '{field}' out")
        numbers.append(number)
    return tuple(numbers)


def read_number(value: object, place: str, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{place}: field '{field}' must be a number, found {describe(value)}")
    if not _is_finite(value):
        raise UserError(f"{place}: field '{field}' must be a finite number, found {describe(value)}")
    if abs(value) > LARGEST_REWARD:
        raise UserError(
            f"{place}: field '{field}' is {value:g}, and above {LARGEST_REWARD:g} squared errors and gradients leave "
            "float32; scale the rewards (nemo-rao score --standardize global), or drop the row"
        )
    return float(value)


def read_score_of_pair(value: object, place: str, field: str) -> float | None:
    """The score of a pair's side, whose label may make it superfluous: NaN where it is a number that is not finite.

    Column stores write NaN for what is missing. Whoever uses the score refuses it.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return math.nan
    return read_number(value, place, field)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False
