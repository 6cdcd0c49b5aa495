"""Records from rows: the inverse of reading, in the canonical format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nemo_rao.batch import Response, Row

# Message fields that a record's response has next to ``content``; the others are in ``message_fields``.
ANSWER_FIELDS = ("reasoning_content", "tool_calls")
# Arguments of the chat template that are columns; the others are in ``chat_template_kwargs``.
TEMPLATE_COLUMNS = ("tools", "documents")


def record_of(row: Row, *, ensemble_names: Sequence[str] = ()) -> dict[str, Any]:
    """Canonical record of a row. Reading it gives an equal row, except for ``location`` and ``unused``.

    A reward that is NaN is written as null, since JSON has no NaN.

    Args:
        row: any row.
        ensemble_names: fields for the members of an ensemble, to be read back with ``reward_field``.
    """
    record: dict[str, Any] = {
        "prompt": row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt],
        "responses": [_response(response, ensemble_names) for response in row.responses],
    }
    if row.ranked:
        record["ranked"] = True
    if row.reference_rewards:
        record["reference_rewards"] = list(row.reference_rewards)
    if row.plain_prompt is not None:
        record["plain_prompt"] = row.plain_prompt
    return record | _with_rest(dict(row.template_fields), TEMPLATE_COLUMNS, "chat_template_kwargs")


def _response(response: Response, ensemble_names: Sequence[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"content": response.content}
    if response.reward is not None:
        record["reward"] = _number(response.reward)
    assert len(response.ensemble) == len(ensemble_names), "each member of an ensemble needs a name"
    record |= {name: _number(reward) for name, reward in zip(ensemble_names, response.ensemble, strict=True)}
    record |= _with_rest(dict(response.fields), ANSWER_FIELDS, "message_fields")
    if response.weight != 1:
        record["weight"] = response.weight
    if response.truncated:
        record["truncated"] = True
    if response.continuation:
        record["continuation"] = [dict(message) for message in response.continuation]
    if response.plain_content is not None:
        record["plain_content"] = response.plain_content
    return record


def _with_rest(fields: dict[str, Any], known: Sequence[str], rest: str) -> dict[str, Any]:
    """Known fields at the top level, the others in a separate object under ``rest``."""
    others = {name: value for name, value in fields.items() if name not in known}
    return {name: fields[name] for name in known if name in fields} | ({rest: others} if others else {})


def _number(reward: float) -> float | None:
    return None if math.isnan(reward) else reward
