"""Construction of responses and rows: the steps that all formats share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemo_rao.batch import Response, Row
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import Messages, check_json, check_unicode, describe, read_text
from nemo_rao.rows.messages import CALLS, answer_of, is_empty, read_calls, read_messages, read_truncated, read_weight
from nemo_rao.rows.prompt import Asked, check_nothing_asked_is_left, read_template_fields
from nemo_rao.rows.rewards import RewardField, read_reward
from nemo_rao.rows.transcripts import has_turns, split_answer_marker
from nemo_rao.rows.view import View
from nemo_rao.rows.writing import ANSWER_FIELDS


def read_response(record: View, content_name: str, reward_name: str, reward_field: RewardField) -> Response:
    """Read a response whose text, reward and other fields are all in ``record``."""
    location, path = record.location, record.path_of(content_name)
    fields = _answer_fields(record)
    if any(fields.get(name) for name in CALLS):
        content = record.get(content_name, "")
        if not isinstance(content, str):
            raise UserError(f"{location}: field '{path}' must be text, found {describe(content)}")
        check_unicode(content, location, path)
    else:
        content = read_text(record.required(content_name), location, path)
    reward, ensemble = read_reward(record, reward_name, reward_field)
    return Response(content, reward, ensemble, fields=fields, **_marks(record))


def _answer_fields(record: View) -> dict[str, Any]:
    """A response's fields for the chat template: ``reasoning_content``, ``tool_calls``, ``message_fields``."""
    others = record.get("message_fields", {})
    path = record.path_of("message_fields")
    if not isinstance(others, dict):
        raise UserError(f"{record.location}: field '{path}' must be an object, found {describe(others)}")
    fields = {name: value for name, value in others.items() if not is_empty(value)}
    for name in ANSWER_FIELDS:
        if not is_empty(record.get(name)):
            fields[name] = read_calls(record, name) if name in CALLS else record[name]
    if fields:
        check_json(fields, record.location, path)
    return fields


def _marks(record: View) -> dict[str, Any]:
    """``weight`` and ``truncated`` of a response."""
    marks: dict[str, Any] = {}
    if "weight" in record:
        marks["weight"] = read_weight(record["weight"], record.location, record.path_of("weight"))
    if "truncated" in record:
        marks["truncated"] = read_truncated(record["truncated"], record.location, record.path_of("truncated"))
    return marks


def read_answer(value: object, record: View, name: str) -> Response:
    """Read an answer given as one assistant message."""
    messages = read_messages(value, record, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(
            f"{record.location}: field '{record.path_of(name)}' must be one assistant message, found messages of "
            f"{roles_of(messages)}"
        )
    return answer_of(messages[0], record.location, record.path_of(name))


def roles_of(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages)


def make_row(
    record: View,
    asked: Asked,
    responses: Sequence[Response],
    names: Sequence[str],
    *,
    ranked: bool = False,
    reference_rewards: tuple[float, ...] = (),
) -> Row:
    """Build the row of a record whose other fields have been read.

    Args:
        record: its unread fields become ``Row.unused`` and ``Row.fields``.
        asked: its prompt.
        responses: its responses.
        names: fields of the responses, for messages.
        ranked, reference_rewards: see :class:`nemo_rao.batch.Row`.

    Raises:
        UserError: an unread column looks like part of the prompt, or an answer to a transcript contains further turns.
    """
    plain = asked.plain
    if asked.is_transcript:
        responses, plain = _answers_of_transcript(asked, responses, names, record.location)
    template_fields = read_template_fields(record)
    check_nothing_asked_is_left(record, asked.content, responses)
    return Row(
        asked.content,
        tuple(responses),
        record.location,
        ranked,
        reference_rewards,
        template_fields,
        plain,
        record.left(),
        record.unread(),
    )


def _answers_of_transcript(
    asked: Asked, responses: Sequence[Response], names: Sequence[str], location: str
) -> tuple[list[Response], str | None]:
    """(answers that end a transcript, without leading marker and whitespace; the text before the answers)."""
    plain, contents = asked.plain, [response.content for response in responses]
    if not asked.awaits_answer:
        markers, rests = zip(*map(split_answer_marker, contents), strict=True) if contents else ((), ())
        if contents and all(markers):
            contents = list(rests)
            plain = None if plain is None else plain + markers[0]
    answers = []
    for response, content, name in zip(responses, contents, names, strict=True):
        if has_turns(content):
            raise UserError(
                f"{location}: field '{name}' must hold one assistant message after the prompt, found further turns "
                "(a blank line, then 'Human:' or 'Assistant:'). Keep only the turn in which the answers differ."
            )
        answers.append(
            dataclasses.replace(
                response,
                content=read_text(content, location, name).strip(),
                plain_content=content if plain is not None else None,
            )
        )
    return answers, plain
