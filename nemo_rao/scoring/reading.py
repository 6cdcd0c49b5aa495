"""A judge's answer as a number on its scale, or the reason why it has none.

    answer -> what follows its thinking -> the pattern's last match -> the text around it -> the scale -> number

The pattern's group is a number only where nothing around it makes it another one: "8,5", "1,000", "7-8", "1-10: 8",
"9/10" on a scale up to 100 have no score, and "9/10" on a scale up to 10 is 9. Nor has an answer that announces its
score once more, in words ("Score: two"), after the last number that matches: that number is most likely a quotation.
An answer that was cut off has no score, whatever it holds: it may be a first guess.
"""

from __future__ import annotations

import re
import unicodedata

from nemo_rao.scoring.chat import ChatAnswer
from nemo_rao.scoring.scorer import NoScore

CUT = NoScore("answer cut off (raise max_tokens)")
EMPTY = NoScore("empty answer")
NO_SCORE = NoScore("no score in the form of pattern")
AMBIGUOUS = NoScore("score beside other numbers, such as 7-8 or 8,5")
OTHER_SCALE = NoScore("score stated on another scale, such as 4/5")
OUTSIDE = NoScore("score outside low and high")

OPENED_THINKING = re.compile(r"(?:<(?:\w+:)?think(?:ing)?>|\[THINK\])\s*$", re.IGNORECASE)
_THINKING = re.compile(r"<(/?)(?:\w+:)?think(?:ing)?>|\[(/?)THINK\]", re.IGNORECASE)
_MARKUP = r"[\s*_`)\]$}]*"  # what may stand between a number and what continues it: "**8**/10", "8 (of 10)"
_OF = re.compile(rf"{_MARKUP}[(\[]?\s*(?:[/⁄／]|\bout\s+of\b|\bof\b)[\s*_`(]*(\d+(?:\.\d+)?)(?![.,]?\d)", re.IGNORECASE)
_PERCENT = re.compile(rf"{_MARKUP}(?:%|percent\b)", re.IGNORECASE)
_GOES_ON = re.compile(rf"{_MARKUP}[(\[]?\s*(?:[/%‰]|(?:to|or|out\s+of)\b)|[A-Za-z]", re.IGNORECASE)
_BEGAN_BEFORE = re.compile(
    r"(?:\d[.,]?|\d\s*(?:[-–—−/]|\b(?:to|or|of|out\s+of)\b)\s*|(?<![\w)\]])[-–—−])$", re.IGNORECASE
)


class ScoreForm:
    """The form in which a judge states its scores.

    Args:
        pattern: regular expression with one group, the score.
        low, high: ends of the scale, both on it.
    """

    def __init__(self, pattern: str, low: float, high: float) -> None:
        self.low, self.high = low, high
        self._pattern = re.compile(pattern)
        self._announcement = _before_the_group(pattern)

    def read(self, answer: ChatAnswer) -> float | NoScore:
        """The number that the answer states."""
        text = None if answer.cut else after_thinking(answer.text)
        if text is None:
            return CUT
        if not text.strip():
            return EMPTY
        match = max(self._pattern.finditer(text), key=lambda one: one.start(), default=None)  # the last one
        if match is None or match[1] is None or self._is_announced_again(text, match.end()):
            return NO_SCORE
        try:
            score = float(match[1])
        except ValueError:
            return NO_SCORE
        if (problem := self._problem_around(text, match)) is not None:
            return problem
        return score if self.low <= score <= self.high else OUTSIDE

    def _is_announced_again(self, text: str, start: int) -> bool:
        return self._announcement is not None and self._announcement.search(text, start) is not None

    def _problem_around(self, text: str, match: re.Match[str]) -> NoScore | None:
        """What the text before and behind the number makes of it; ``None``: nothing else.

        Behind it, the line counts, up to a quotation mark: in JSON another field may follow.
        """
        before = text[: match.start(1)].rpartition("\n")[2]
        glued = match.start(1) == match.start() and before[-1:].isascii() and before[-1:].isalpha()
        if glued or _BEGAN_BEFORE.search(before):
            return AMBIGUOUS
        behind = re.split(r'[\n"]', text[match.end(1) :], maxsplit=1)[0]
        if (stated := _OF.match(behind)) is not None:
            if float(stated[1]) != self.high:
                return OTHER_SCALE
            behind = behind[stated.end() :]
        elif (stated := _PERCENT.match(behind)) is not None:
            if (self.low, self.high) != (0, 100):
                return OTHER_SCALE
            behind = behind[stated.end() :]
        if _GOES_ON.match(behind) or any(unicodedata.category(one).startswith("N") for one in behind):
            return AMBIGUOUS
        return None


def after_thinking(text: str) -> str | None:
    """What follows the thinking, which templates may have opened before the answer; ``None`` where it does not end."""
    is_open = False
    start = 0
    for tag in _THINKING.finditer(text):
        is_open = not (tag[1] or tag[2])
        start = tag.end()
    return None if is_open else text[start:]


def _before_the_group(pattern: str) -> re.Pattern[str] | None:
    """What announces a score: the pattern up to its group. ``None`` where that may be nothing at all."""
    at, depth, in_class = 0, 0, False
    while at < len(pattern):
        one = pattern[at]
        if one == "\\":
            at += 1
        elif in_class:
            in_class = one != "]"
        elif one == "[":
            in_class = True
            at += pattern[at + 1 :].startswith("]") or 2 * pattern[at + 1 :].startswith("^]")
        elif one == "(":
            if not pattern.startswith("(?", at) or pattern.startswith("(?P<", at):
                break
            depth += 1
        elif one == ")":
            depth -= 1
        at += 1
    try:
        announcement = re.compile(pattern[:at] + ")" * depth)
    except re.error:  # such as a conditional
        return None
    return None if announcement.search("") else announcement
