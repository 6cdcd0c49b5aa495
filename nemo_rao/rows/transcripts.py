"""Conversations published as one text, in the form of Anthropic's hh-rlhf: turns after "Human:" and "Assistant:".

With a chat template, a transcript is rendered as messages; inside one user message it would be a text about a
conversation. Without a template it is trained on unchanged, so its text is kept as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether the text begins with a human turn, and either has another turn or begins with a blank line."""
    turns = list(_TURN.finditer(text))
    return bool(turns) and turns[0].start() == 0 and turns[0][1] == "Human" and (len(turns) > 1 or text[:2] == "\n\n")


def turns_of(text: str) -> list[tuple[dict[str, Any], int]]:
    """(message, offset of its text) of each turn; contents are stripped."""
    found = list(_TURN.finditer(text))
    ends = [turn.start() for turn in found[1:]] + [len(text)]
    return [
        ({"role": _ROLES[turn[1]], "content": text[turn.end() : end].strip()}, turn.end())
        for turn, end in zip(found, ends, strict=True)
    ]


def has_turns(text: str) -> bool:
    """Whether another turn begins inside or at the start of the text."""
    return _TURN.search(text) is not None


def split_prompt(text: str) -> tuple[tuple[Mapping[str, Any], ...], bool] | None:
    """Split a prompt's transcript into (messages, whether it ends where the assistant begins to answer).

    Returns ``None`` for other texts, and for those that a user may have written about a conversation: they end with an
    answer, or with a human turn without beginning with the blank line of a published transcript.
    """
    if not is_transcript(text):
        return None
    messages = [message for message, _ in turns_of(text)]
    last = messages[-1]
    if last["role"] == "assistant" and not last["content"]:
        return tuple(messages[:-1]), True
    return (tuple(messages), False) if last["role"] == "user" and text[:2] == "\n\n" else None


def split_answer_marker(text: str) -> tuple[str, str]:
    """("Assistant:" with leading whitespace, the rest) of an answer that begins so; ("", text) otherwise."""
    turn = _TURN.match(text)
    return (text[: turn.end()], text[turn.end() :]) if turn and turn[1] == "Assistant" else ("", text)
