"""Published forms of messages, converted to what a chat template takes: ``role``, ``content`` and further fields.

Accepted are OpenAI messages (content may be text, text parts, or null next to tool calls), ShareGPT messages (``from``,
``value``), and both as JSON text or Python literals, which exports to CSV and Parquet produce. The other fields of a
message (``reasoning_content``, ``tool_calls``, ``name``, ``tool_call_id``, ...) are kept for the template.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from nemo_rao.batch import Response
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import Messages, check_json, check_unicode, describe, is_json, read_text
from nemo_rao.rows.view import View

# ShareGPT's speaker -> role.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
CALLS = ("tool_calls", "function_call")  # with one of these, a message's content may be empty
_MESSAGES_AS_TEXT = re.compile(r"\s*(?:array\()?\[?\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


def as_messages(value: object, location: str, field: str) -> object:
    """Decode messages stored as text and wrap a single message in a list. Other values are returned unchanged.

    Raises:
        UserError: a text begins like messages but is neither JSON nor a Python literal.
    """
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        decoded = _decoded(value)
        if decoded is None:
            raise UserError(
                f"{location}: field '{field}' is text that begins like a list of messages, but is not JSON. "
                "Rewrite the file with messages as a list, or as JSON text."
            )
        value = decoded
    if isinstance(value, Mapping) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value)):
        return [value]
    return value


def decoded_json(value: object, location: str, field: str) -> Any:
    """Decode a field that column stores hold as JSON text, such as ``tools``, as a whole or entry by entry."""
    if isinstance(value, list):
        return [decoded_json(entry, location, f"{field}[{number}]") for number, entry in enumerate(value)]
    if not isinstance(value, str):
        return value
    decoded = _decoded(value)
    if decoded is None:
        raise UserError(f"{location}: field '{field}' must be an object or a list, or JSON text of one")
    return decoded


def is_empty(value: Any) -> bool:
    """Whether a field is null, blank or an empty container."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (list, dict, tuple)) and not value)


def _decoded(text: str) -> Any:
    """The object or list that a text encodes, or ``None``."""
    for decode in (json.loads, ast.literal_eval):
        try:
            value = decode(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, (dict, list)):
            return value
    return None


def read_prompt(value: object, record: View, name: str) -> str | Messages:
    """Read a prompt: text or messages."""
    value = as_messages(value, record.location, record.path_of(name))
    if isinstance(value, str):
        return read_text(value, record.location, record.path_of(name))
    return read_messages(value, record, name)


def check_prompt(messages: Messages, location: str, field: str) -> Messages:
    """Reject messages that do not end with a message to be answered."""
    last = messages[-1]
    read_text(last["content"], location, f"{field}[{len(messages) - 1}].content")
    if last["role"] == "assistant":
        raise UserError(
            f"{location}: field '{field}' ends with an assistant message, but a prompt must end with the message to be "
            "answered"
        )
    return messages


def read_messages(value: object, record: View, name: str) -> Messages:
    """Read a list of messages, each with ``role``, ``content`` and its other fields, without nulls.

    Raises:
        UserError: it is not such a list, or a message's content is not text.
    """
    location, field = record.location, record.path_of(name)
    value = as_messages(value, location, field)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{location}: field '{field}' must be text or a list of messages, found {describe(value)}")
    if not value:
        raise UserError(f"{location}: field '{field}' is empty. Drop the row or fill it in.")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{location}: field '{field}[{number}]' must be a message with role and content, found "
                f"{describe(message)}"
            )
        messages.append(_read_message(record.child(message, name, number)))
    return tuple(messages)


def _read_message(message: View) -> dict[str, Any]:
    is_sharegpt = "from" in message and "role" not in message
    role, content_name, calls = _speaker(message) if is_sharegpt else (_role(message), "content", {})
    calls |= {
        name: read_calls(message, name) for name in CALLS if name not in calls and not is_empty(message.get(name))
    }
    no_content = content_name is None or (calls and content_name not in message)
    read = {"role": role, "content": "" if no_content else _read_content(message, str(content_name))} | calls
    for name in message:
        if name not in (*CALLS, "role", "content", *(("from", "value") if is_sharegpt else ())):
            read |= _read_other(message, name)
    if role != "assistant":  # only assistant messages are learned
        read.pop("weight", None)
    return read


def _role(message: View) -> str:
    role = read_text(message.required("role"), message.location, message.path_of("role"))
    if len(role.split()) > 1:
        raise UserError(
            f"{message.location}: field '{message.path_of('role')}' must be one word, such as user, "
            f"found {describe(role)}"
        )
    return role


def _speaker(message: View) -> tuple[str, str | None, dict[str, Any]]:
    """(role, name of the content field, tool calls) of a ShareGPT message, whose calls are JSON text."""
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise UserError(
            f"{message.location}: field '{message.path_of('from')}' must be one of {', '.join(SPEAKERS)}, found "
            f"{describe(speaker)}"
        )
    role = SPEAKERS[speaker.lower()]
    if speaker.lower() != "function_call":
        return role, "value", {}
    message.required("value")
    called = read_calls(message, "value", "tool_calls")
    return role, None, {"tool_calls": [_in_full(call) for call in called]}


def _in_full(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form of a call, also if the given one is only a name and arguments."""
    return call if "function" in call else {"type": "function", "function": call}


def read_calls(record: View, name: str, kind: str | None = None) -> Any:
    """Read ``tool_calls``, a list of objects, or OpenAI's older ``function_call``, an object, also from JSON text."""
    calls = decoded_json(record[name], record.location, record.path_of(name))
    if (kind or name) == "tool_calls":
        calls = [calls] if isinstance(calls, dict) else calls
        well_formed = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    else:
        well_formed = isinstance(calls, dict)
    if not well_formed:
        raise UserError(
            f"{record.location}: field '{record.path_of(name)}' must hold tool calls as objects, "
            f"found {describe(calls)}"
        )
    check_json(calls, record.location, record.path_of(name))
    return calls


def _read_other(message: View, name: str) -> dict[str, Any]:
    """Read a field for the template. Empty fields are skipped, and values without a JSON form are left as unused."""
    value = message.peek(name)
    if name == "weight":
        return {name: read_weight(message[name], message.location, message.path_of(name))}
    if is_empty(value):
        message[name]
        return {}
    if not is_json(value):
        return {}
    check_json(value, message.location, message.path_of(name))
    return {name: message[name]}


def _read_content(message: View, field: str) -> str:
    """Read text content, or join a list of text parts."""
    content, path = message.required(field), message.path_of(field)
    if isinstance(content, list):
        texts = []
        for number, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = f"type {part['type']!r}" if isinstance(part, Mapping) and "type" in part else describe(part)
                raise UserError(
                    f"{message.location}: field '{path}' must be text, or a list of text parts "
                    f'({{"type": "text", "text": ...}}), found part {number + 1} of {kind}. Drop the row.'
                )
            view = message.child(part, field, number)
            texts.append(view["type"] and view["text"])
        content = "".join(texts)
    if not isinstance(content, str):
        raise UserError(f"{message.location}: field '{path}' must be text, found {describe(content)}")
    return check_unicode(content, message.location, path)


def read_weight(value: object, location: str, field: str) -> float:
    """Read a message's weight: 1, or 0 for an answer that is not learned."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return float(value)
    raise UserError(f"{location}: field '{field}' must be 0 or 1, found {describe(value)}. Drop the row.")


def read_truncated(value: object, location: str, field: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{location}: field '{field}' must be true or false, found {describe(value)}")
    return value


def answer_of(
    message: Mapping[str, Any],
    location: str,
    field: str,
    reward: float | None = None,
    ensemble: tuple[float, ...] = (),
    continuation: Messages = (),
) -> Response:
    """Convert an assistant message to a response.

    Args:
        message: as returned by :func:`read_messages`.
        location, field: its location, for error messages.
        reward, ensemble, continuation: see :class:`nemo_rao.batch.Response`.

    Raises:
        UserError: it has neither text nor tool calls.
    """
    fields = {name: value for name, value in message.items() if name not in ("role", "content", "weight", "truncated")}
    content = message["content"]
    if not any(fields.get(name) for name in CALLS):
        content = read_text(content, location, field)
    truncated = read_truncated(message.get("truncated", False), location, f"{field}.truncated")
    weight = message.get("weight", 1.0)
    return Response(content, reward, ensemble, tuple(continuation), fields, weight, truncated)


def without_weights(messages: Messages) -> Messages:
    """Prompt messages without weights: they are context in any case."""
    return tuple({name: value for name, value in message.items() if name != "weight"} for message in messages)
