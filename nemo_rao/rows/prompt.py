"""A record's prompt, under any of its common names, and the columns that belong to it.

    prompt (or question, query, instruction with input, ...)  +  system  +  history   ->  messages or plain text
    tools, documents, chat_template_kwargs                                            ->  the chat template's arguments

An unused column that looks like part of the prompt is an error, not a remark: without it the model would be trained to
answer a different question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo_rao.batch import Response
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import Messages, check_json, describe, read_text
from nemo_rao.rows.messages import (
    SPEAKERS,
    as_messages,
    check_prompt,
    decoded_json,
    is_empty,
    read_messages,
    read_prompt,
    without_weights,
)
from nemo_rao.rows.transcripts import split_prompt
from nemo_rao.rows.view import View
from nemo_rao.rows.writing import TEMPLATE_COLUMNS

PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input")
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
PROMPT_LIKE = frozenset(  # lower-case names
    (
        *(*PROMPT_NAMES, *CONVERSATIONS, *SYSTEM_NAMES, *TEMPLATE_COLUMNS, "chat_template_kwargs", "functions"),
        *("history", "context", "contexts", "problem", "passage", "document", "dialogue", "dialog", "system_msg"),
        *("instructions", "inputs", "questions", "prompts"),
        *("user_prompt", "user_query", "user_input", "user_message"),
    )
)


@dataclass(frozen=True)
class Asked:
    """A record's prompt.

    Attributes:
        content: messages or plain text, as in :class:`nemo_rao.batch.Row`.
        is_transcript: whether it was published as one text.
        plain: that text, unless another column holds one of the messages.
        awaits_answer: whether the text ends with "Assistant:"; otherwise its answers may begin with it.
    """

    content: str | Messages
    is_transcript: bool = False
    plain: str | None = None
    awaits_answer: bool = True


def read_asked(record: View, own: str = "prompt") -> Asked:
    """Read the record's prompt, with the system message and history from separate columns.

    Args:
        record: these columns count as read afterwards.
        own: the format's own name of the prompt, which takes precedence.

    Raises:
        UserError: there is no prompt, or it cannot be used.
    """
    content = read_given(record, own)
    if content is None:
        content = read_prompt(record.required(own), record, own)
    return with_context(record, content)


def read_given(record: View, own: str = "prompt") -> str | Messages | None:
    """The prompt without context, or ``None`` if no field holds one."""
    name = prompt_name(record, own)
    if name is None:
        return next(filter(None, (_unanswered(record, name) for name in CONVERSATIONS if name in record)), None)
    content = read_prompt(record[name], record, name)
    if name == "instruction" and isinstance(content, str) and _is_filled(record, "input"):  # Alpaca
        content += "\n" + read_text(record["input"], record.location, "input")
    return content


def prompt_name(record: View, own: str = "prompt") -> str | None:
    """Name of the field that holds the prompt, apart from conversations."""
    names = dict.fromkeys((own, *PROMPT_NAMES))
    return own if own in record else next((name for name in names if _is_filled(record, name)), None)


def _is_filled(record: View, name: str) -> bool:
    """Whether the field is present and not empty, without marking it as read."""
    return name in record and not is_empty(record.peek(name))


def _unanswered(record: View, name: str) -> Messages | None:
    """A conversation that ends with a message to be answered; otherwise ``None``, and the field stays unread."""
    value = as_messages(record.peek(name), record.location, record.path_of(name))
    last = value[-1] if isinstance(value, list) and value else None
    if not isinstance(last, dict) or _is_answer(last):
        return None
    return read_messages(record[name], record, name)


def asks_alone(record: View) -> bool:
    """Whether the record holds a prompt, or a conversation without an answer, and so needs no responses."""
    name = next((name for name in CONVERSATIONS if name in record), None)
    if name is None:
        return any(name in record or record.is_null(name) for name in PROMPT_NAMES)
    messages = as_messages(record.peek(name), record.location, name)
    return isinstance(messages, list) and not any(map(_is_answer, messages))


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and SPEAKERS.get(str(message.get("role", message.get("from")))) == "assistant"


def with_context(record: View, content: str | Messages, name: str = "prompt") -> Asked:
    """Put system message and history before the prompt and split transcripts into messages.

    Args:
        name: the prompt's field, for messages.

    Raises:
        UserError: the last message is empty or the assistant's.
    """
    plain: str | None = None
    awaits_answer = True
    if isinstance(content, str) and (transcript := split_prompt(content)) is not None:
        plain = content
        content, awaits_answer = transcript
    is_transcript = plain is not None
    before = (*_system(record, content), *_history(record))
    if before:
        messages = ({"role": "user", "content": content},) if isinstance(content, str) else content
        leading = 1 if messages and messages[0]["role"] == "system" and before[0]["role"] != "system" else 0
        content, plain = (*messages[:leading], *before, *messages[leading:]), None
    if not isinstance(content, str) and content:
        content = check_prompt(without_weights(content), record.location, name)
    return Asked(content, is_transcript, plain, awaits_answer)


def _system(record: View, content: str | Messages) -> Messages:
    """The system message from a separate column, unless the messages already begin with it."""
    name = next((name for name in SYSTEM_NAMES if _is_filled(record, name)), None)
    if name is None:
        return ()
    text = read_text(record[name], record.location, name)
    if not isinstance(content, str) and content and content[0]["role"] == "system":
        if _same(content[0]["content"], text):
            return ()
        raise UserError(
            f"{record.location}: field '{name}' differs from the system message of the prompt. Keep one of them, or "
            f"add {name} to data.ignore_fields."
        )
    return ({"role": "system", "content": text},)


def _history(record: View) -> Messages:
    """LLaMA-Factory's earlier turns, ``[[question, answer], ...]``; or messages."""
    if not _is_filled(record, "history"):
        return ()
    history, location = record["history"], record.location
    if not isinstance(history, list):
        raise UserError(
            f"{location}: field 'history' must be a list of [question, answer] or of messages, found "
            f"{describe(history)}"
        )
    if all(isinstance(turn, dict) for turn in history):
        return read_messages(history, record, "history")
    messages = []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(
                f"{location}: field 'history[{number}]' must be [question, answer], found {describe(turn)}. Drop the "
                "row."
            )
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": read_text(text, location, f"history[{number}]")})
    return tuple(messages)


def read_template_fields(record: View) -> dict[str, Any]:
    """``tools``, ``documents`` (also as JSON text) and TRL's ``chat_template_kwargs``."""
    found: dict[str, Any] = {}
    for name in TEMPLATE_COLUMNS:
        if _is_filled(record, name):
            value = decoded_json(record[name], record.location, name)
            if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
                raise UserError(
                    f"{record.location}: field '{name}' must be a list of objects, found {describe(value)}. "
                    f"Correct it, or add {name} to data.ignore_fields."
                )
            if value:
                found[name] = value
    if _is_filled(record, "chat_template_kwargs"):
        given = decoded_json(record["chat_template_kwargs"], record.location, "chat_template_kwargs")
        if not isinstance(given, dict):
            raise UserError(
                f"{record.location}: field 'chat_template_kwargs' must be an object, found {describe(given)}. Drop it."
            )
        found = given | found
    for name, value in found.items():
        check_json(value, record.location, name)
    return found


def check_nothing_asked_is_left(record: View, content: str | Messages, responses: Iterable[Response]) -> None:
    """Reject unread fields that look like part of the prompt. Empty or redundant ones are marked as read instead."""
    suspects = {
        name: value
        for name, value in record.unread().items()
        if name.lower() in PROMPT_LIKE and isinstance(value, (str, list, tuple, dict))
    }
    texts = _texts_of(content, responses) if suspects else set()
    left = []
    for name, value in suspects.items():
        if is_empty(value) or _is_redundant(as_messages(value, record.location, name), texts):
            record[name]
        else:
            left.append(name)
    if left:
        fields = f"field '{left[0]}' looks" if len(left) == 1 else f"fields {', '.join(map(repr, left))} look"
        raise UserError(
            f"{record.location}: {fields} like part of the prompt, but would not be used. Map it "
            f"(data.columns.prompt={left[0]}), or ignore it (data.ignore_fields=[{','.join(left)}])."
        )


def _texts_of(content: str | Messages, responses: Iterable[Response]) -> set[str]:
    """All texts of a row, with whitespace normalized."""
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    for response in responses:
        texts += [response.content, *(message["content"] for message in response.continuation)]
    return set(map(_normal, texts))


def _is_redundant(value: Any, texts: set[str]) -> bool:
    """Whether a text, or every message of a conversation, is among the row's texts."""
    if isinstance(value, str):
        return _normal(value) in texts
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return False
    names = {name for message in value for name, entry in message.items() if entry is not None}
    if not names <= {"role", "content", "from", "value"}:
        return False  # it holds more than texts
    contents = [message.get("content", message.get("value")) for message in value]
    return all(isinstance(content, str) and _normal(content) in texts for content in contents)


def _same(one: str, other: str) -> bool:
    return _normal(one) == _normal(other)


def _normal(text: str) -> str:
    return " ".join(text.split())
