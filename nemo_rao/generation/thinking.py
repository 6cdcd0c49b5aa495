"""Separation of a model's thinking from its answer, by the tags of published models."""

from __future__ import annotations

import re

_NAME = r"(?:ant)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad|inner_monologue)"
# <think>, <seed:think>, <thinking budget="1">; [THINK] (no other square brackets: [Analysis] is a heading);
# ◁think▷; <|begin_of_thought|>, <|START_THINKING|>; gpt-oss's <|channel|>analysis<|message|>.
_OPENS = (
    rf"<(?:\w+:)?{_NAME}(?:\s[^<>]*)?>|\[THINK\]|◁{_NAME}▷|<\|(?:begin_of_|start_)?{_NAME}\|>"
    r"|<\|channel\|>(?:analysis|commentary)\b[^<]*<\|message\|>"
)
_CLOSES = (
    rf"</(?:\w+:)?{_NAME}\s*>|\[/THINK\]|◁/{_NAME}▷|<\|(?:end_of_|end_|/){_NAME}\|>"
    r"|<\|channel\|>final\b[^<]*<\|message\|>"
)
_TAG = re.compile(rf"(?P<opens>{_OPENS})|(?:{_CLOSES})", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{_OPENS})\s*$", re.IGNORECASE)


def opened_thinking(prompt: str) -> str:
    """The tag at the end of a prompt that opens thinking, with trailing whitespace; empty if there is none."""
    found = _OPENED.search(prompt)
    return "" if found is None else found[0]


def after_thinking(text: str) -> str | None:
    """The text after the thinking, which the prompt may have opened; ``None`` if the thinking does not end."""
    is_open, start = False, 0
    for tag in _TAG.finditer(text):
        is_open, start = tag["opens"] is not None, tag.end()
    return None if is_open else text[start:]
