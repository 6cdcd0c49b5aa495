"""Conversations published as one text, in the form of Anthropic's hh-rlhf: turns after "Human:" and "Assistant:".

Under a chat template a transcript is its messages; inside one user message it would be a text about a conversation.
Without a template it is trained on as it stands, so its text is kept beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether the text begins with the human's turn and has another one, or does so after a blank line."""
    turns = list(_TURN.finditer(text))
    return bool(turns) and turns[0].start() == 0 and turns[0][1] == "Human" and (len(turns) > 1 or text[:2] == "\n\n")


def turns_of(text: str) -> list[tuple[dict[str, Any], int]]:
    """(message, where its text begins) of each turn; contents without the blanks at their ends."""
    found = list(_TURN.finditer(text))
    ends = [turn.start() for turn in found[1:]] + [len(text)]
    return [
        ({"role": _ROLES[turn[1]], "content": text[turn.end() : end].strip()}, turn.end())
        for turn, end in zip(found, ends, strict=True)
    ]


def has_turns(text: str) -> bool:
    """Whether another turn begins inside or at the start of the text."""
    return _TURN.search(text) is not None


def split_prompt(text: str) -> tuple[tuple[Mapping[str, Any], ...], bool]:
    """(the messages of a prompt's transcript, whether it ends where the assistant begins to answer)."""
    messages = [message for message, _ in turns_of(text)]
    open_answer = messages[-1]["role"] == "assistant" and not messages[-1]["content"]
    return tuple(messages[:-1] if open_answer else messages), open_answer


def split_answer_marker(text: str) -> tuple[str, str]:
    """("Assistant:" with the blanks before it, what follows) of an answer that begins so; ("", text) otherwise."""
    turn = _TURN.match(text)
    return (text[: turn.end()], text[turn.end() :]) if turn and turn[1] == "Assistant" else ("", text)
