"""Pairs in the format of TRL and UltraFeedback-binarized, and the prompt that both sides share."""

from __future__ import annotations

import dataclasses

from nemo_rao.batch import Response, Row
from nemo_rao.errors import UserError
from nemo_rao.rows.fields import Messages, describe, read_text
from nemo_rao.rows.messages import answer_of, as_messages, read_messages
from nemo_rao.rows.prompt import Asked, prompt_name, read_given, with_context
from nemo_rao.rows.responses import make_row, roles_of
from nemo_rao.rows.rewards import RewardField, no_reward_field, read_score_of_pair
from nemo_rao.rows.transcripts import is_transcript, turns_of
from nemo_rao.rows.view import View

SIDES = ("chosen", "rejected")


def from_chosen_rejected(record: View, reward_field: RewardField) -> Row:
    """``chosen``, ``rejected``, and optionally a prompt (``prompt``, ``question``, ...) and the two scores.

    Both sides are text or both are messages. Messages may contain only the answer or the whole conversation; the shared
    leading messages are then the prompt, as are the shared turns of two transcripts. Other text needs a separate
    prompt, since two answers may begin alike ("The answer is").
    """
    no_reward_field(reward_field, "score_chosen and score_rejected", record.location)
    sides = [as_messages(record.required(side), record.location, side) for side in SIDES]
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise UserError(
            f"{record.location}: field 'chosen' is {describe(sides[0])} and field 'rejected' is {describe(sides[1])}. "
            "Write both as text or both as messages."
        )
    prompt = read_given(record)
    if isinstance(sides[0], str):
        texts = [read_text(text, record.location, side) for text, side in zip(sides, SIDES, strict=True)]
        asked, answers = _from_texts(record, prompt, texts)
    else:
        chosen, rejected = (read_messages(value, record, side) for value, side in zip(sides, SIDES, strict=True))
        before = _shared_prompt(prompt, (chosen, rejected), record)
        asked = with_context(record, before)
        answers = [
            answer_of(messages[-1], record.location, side)
            for messages, side in zip((chosen, rejected), SIDES, strict=True)
        ]
    scored = [
        dataclasses.replace(
            answer, reward=read_score_of_pair(record.get(f"score_{side}"), record.location, f"score_{side}")
        )
        for answer, side in zip(answers, SIDES, strict=True)
    ]
    return make_row(record, asked, scored, SIDES, ranked=True)


def _from_texts(record: View, prompt: str | Messages | None, texts: list[str]) -> tuple[Asked, list[Response]]:
    """(prompt, answers) of two sides that are text."""
    if all(map(is_transcript, texts)):
        turns = [turns_of(text) for text in texts]
        conversations = [tuple(message for message, _ in side) for side in turns]
        before = _shared_prompt(prompt, (conversations[0], conversations[1]), record)
        starts = [side[-1][1] for side in turns]
        if before == conversations[0][:-1]:  # the transcript is the whole prompt: also keep it as text
            before = texts[0][: starts[0]]
        answers = [text[start:] for text, start in zip(texts, starts, strict=True)]
        responses = [
            Response(read_text(answer, record.location, side)) for answer, side in zip(answers, SIDES, strict=True)
        ]
        return with_context(record, before), responses
    if prompt is None:
        found = ", ".join(record) or "none"
        raise UserError(
            f"{record.location}: field 'prompt' is missing (fields found: {found}): no field holds the prompt of "
            "'chosen' and 'rejected', and they are not transcripts (Human: ..., Assistant: ...). Name the field that "
            "does (data.columns.prompt=NAME), split the shared prompt off, or drop the row."
        )
    return with_context(record, prompt), [Response(text) for text in texts]


def _shared_prompt(
    prompt: str | Messages | None, conversations: tuple[Messages, Messages], record: View
) -> str | Messages:
    """The messages before the one assistant message in which the two sides may differ."""
    location, (chosen, rejected) = record.location, conversations
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    leading = chosen[:shared]
    before: str | Messages = leading
    name = prompt_name(record) or "prompt"
    if isinstance(prompt, str):
        if not leading:
            before = prompt
        elif all(" ".join(message["content"].split()) != " ".join(prompt.split()) for message in leading):
            raise UserError(
                f"{location}: field '{name}' is text that is missing from the messages shared by 'chosen' and "
                "'rejected'. Add it there as a user message, write only the answers, or leave it out "
                f"(data.ignore_fields=[{name}])."
            )
    elif prompt is not None and leading[: len(prompt)] != prompt:  # otherwise both sides repeat the prompt
        before = prompt if prompt[len(prompt) - shared :] == leading else prompt + leading
    if not before:
        raise UserError(
            f"{location}: field 'prompt' is missing, and 'chosen' and 'rejected' share no leading messages that could "
            "be the prompt. Add it or drop the row."
        )
    for side, messages in zip(SIDES, conversations, strict=True):
        answer = messages[shared:]
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise UserError(
                f"{location}: field '{side}' must hold one assistant message after the part shared with the other "
                f"side, found messages of {roles_of(answer)}. Keep only the turn in which the two conversations differ."
            )
    return before
