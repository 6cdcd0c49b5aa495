"""Check that a rendered text contains the messages that it was rendered from.

A message's content counts as contained if it occurs in the text unchanged, apart from surrounding whitespace, or
JSON-escaped, which is how templates quote tool results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nemo_rao.errors import UserError

Message = Mapping[str, Any]

# Keys of a message that are not extra fields for the template.
_OWN = frozenset({"role", "content", "weight"})
_LONGEST_QUOTE = 60  # characters
_SHORTEST_MATCH = 3


def find(text: str, content: str, start: int = 0) -> int:
    """Index in ``text`` where the first occurrence of the content at or after ``start`` ends; -1 if there is none."""
    content = content.strip()
    at = text.find(content, start)
    if at >= 0:
        return at + len(content)
    for escaped in (json.dumps(content, ensure_ascii=False)[1:-1], json.dumps(content)[1:-1]):
        if escaped != content and (at := text.find(escaped, start)) >= 0:
            return at + len(escaped)
    return -1


def first_missing(contents: Sequence[str], text: str) -> int | None:
    """Index of a content that is missing from ``text``. Each one needs its own occurrence; the order is free."""
    position = 0
    for content in contents:
        position = find(text, content, position)
        if position < 0:
            break
    else:
        return None
    # Some templates move messages: Mistral's puts the system message before the last question.
    for at in sorted(range(len(contents)), key=lambda at: -len(contents[at])):
        if (end := find(text, contents[at])) < 0:
            return at
        text = text[: end - len(contents[at].strip())] + "\0" + text[end:]
    return None


def difference(content: str, text: str) -> str:
    """The part of the content that ``text`` lacks, quoted: the content without its longest prefix and suffix in
    ``text``."""
    content = content.strip()
    start = _longest(len(content), lambda length: content[:length] in text)
    end = _longest(len(content) - start, lambda length: content[len(content) - length :] in text)
    return quoted(content[start : len(content) - end] or content)


def _longest(limit: int, holds: Callable[[int], bool]) -> int:
    """Largest length up to ``limit`` for which the monotone ``holds`` is true; 0 if it is too short to be significant,
    since almost any text holds a given letter."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low if low >= _SHORTEST_MATCH else 0


def quoted(text: str) -> str:
    half = _LONGEST_QUOTE // 2
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:half]} ... {text[-half:]}")


def contents_of(message: Message) -> str:
    """The message's content, or an empty string if it is null."""
    content = message.get("content")
    return content if isinstance(content, str) else ""


def field_names(messages: Sequence[Message]) -> list[str]:
    """Names of the messages' non-empty fields other than role and content."""
    return list({name: None for message in messages for name, value in message.items() if name not in _OWN and value})


def unrendered_fields(
    messages: Sequence[Message],
    beside: Mapping[str, Any],
    text: str,
    render: Callable[[Sequence[Message], Mapping[str, Any]], str],
) -> list[str]:
    """Names of the fields that do not change the rendering.

    Args:
        messages: as they were rendered. A field that is rendered for one of them counts as rendered for all.
        beside: fields next to the messages (``tools``).
        text: the rendering of both.
        render: renders messages and fields.
    """

    def same_without(changed: Sequence[Message], fields: Mapping[str, Any]) -> bool:
        try:
            return render(changed, fields) == text
        except UserError:  # the template requires the field
            return False

    names = []
    for name in field_names(messages):
        changed = [{key: value for key, value in message.items() if key != name} for message in messages]
        if same_without(changed, beside):
            names.append(name)
    for name, value in beside.items():
        if value and same_without(messages, {key: other for key, other in beside.items() if key != name}):
            names.append(name)
    return names


def unrendered_call(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message], Mapping[str, Any]], str]
) -> Any:
    """One of several ``tool_calls`` of a message that does not change the rendering, or ``None``.

    Args:
        messages, text, render: see :func:`unrendered_fields`.
    """
    for at, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not isinstance(calls, (list, tuple)) or len(calls) < 2:
            continue
        for number, call in enumerate(calls):
            others = {**message, "tool_calls": [*calls[:number], *calls[number + 1 :]]}
            try:
                if render([*messages[:at], others, *messages[at + 1 :]], {}) == text:
                    return call
            except UserError:  # the template requires the call
                continue
    return None


def find_missing_part(name: str, value: Any, text: str) -> str | None:
    """A part of a field that is missing from ``text``: a name of ``tools``, a name or argument of ``tool_calls``, or
    the whole of a text field. Other fields are not inspected."""
    if isinstance(value, str):
        return value if find(text, value) < 0 else None
    if name not in ("tools", "tool_calls") or not isinstance(value, (list, tuple)):
        return None
    for item in value:
        function = item.get("function", item) if isinstance(item, Mapping) else {}
        if not isinstance(function, Mapping):
            continue
        called = function.get("name")
        if isinstance(called, str) and find(text, called) < 0:
            return called
        arguments = function.get("arguments") if name == "tool_calls" else None
        if isinstance(arguments, str) and find(text, arguments) < 0:
            arguments = _parsed(arguments)
        elif isinstance(arguments, str):
            continue
        for leaf in _texts(arguments):
            if find(text, leaf) < 0:
                return leaf
    return None


def _parsed(arguments: str) -> Any:
    """Parse arguments given as JSON text, which some templates re-serialize. Other text is returned unchanged."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, including field names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
