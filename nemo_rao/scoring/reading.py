"""Conversion of a judge's answer to a number on its scale, or the reason why it has none.

    answer -> text after its thinking -> the pattern's last match -> the text around it -> the scale -> number

The pattern's group is accepted as a number only if the text around it does not change its meaning: "8,5", "1,000",
"7-8", "1-10: 8", "4 of five", and "9/10" on a scale up to 100 have no score; "9/10" on a scale up to 10 is 9. An answer
also has no score if it states its score again after the last match, in words ("Score: two") or another form ("my final
score is 2"), since the match is then probably a quotation; or if it continues from its overall score to scores of
single aspects. An incomplete answer never has a score: it may be a first guess.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from nemo_rao.generation.thinking import after_thinking
from nemo_rao.scoring.chat import CUT_OFF, ChatAnswer
from nemo_rao.scoring.scorer import NoScore

CUT = NoScore(CUT_OFF)
EMPTY = NoScore("empty answer")
NO_SCORE = NoScore("no score in the form of pattern")
AMBIGUOUS = NoScore("score next to other numbers, such as 7-8 or 8,5")
OTHER_SCALE = NoScore("score stated on another scale, such as 4/5")
OUTSIDE = NoScore("score outside low and high")
SEVERAL = NoScore("several scores, and it is unclear which one is meant")

_MARKUP = r"[\s*_`)\]$}]*"  # may separate a number from its continuation: "**8**/10", "8 (of 10)"
_OF = re.compile(rf"{_MARKUP}[(\[]?\s*(?:[/⁄／]|\bout\s+of\b|\bof\b)[\s*_`(]*(\d+(?:\.\d+)?)(?![.,]?\d)", re.IGNORECASE)
_PERCENT = re.compile(rf"{_MARKUP}(?:%|percent\b)", re.IGNORECASE)
_GOES_ON = re.compile(rf"{_MARKUP}[(\[]?\s*(?:[/%‰]|(?:to|or|of|out\s+of)\b)|[A-Za-z]", re.IGNORECASE)
_NUMBER_WORD = re.compile(
    r"\bof\s+(?:two|three|four|five|six|seven|eight|nine|ten|twenty|(?:a\s+)?hundred)\b"
    r"|\band\s+(?:an?\s+|three\s+)?(?:half|quarters?)\b",
    re.IGNORECASE,
)
_BEGAN_BEFORE = re.compile(
    r"(?:\d[.,]?|\d\s*(?:[-–—−/]|\b(?:to|or|of|out\s+of)\b)\s*|(?<![\w)\]])[-–—−])$", re.IGNORECASE
)


# Right before a match: marks the final score; marks an end of the scale.
_OVERALL = re.compile(r"\b(?:overall|final|total)[\s*_-]*$", re.IGNORECASE)
_BOUND = re.compile(r"\b(?:max(?:imum)?|min(?:imum)?|highest|lowest)(?:\s+possible)?[\s*_-]*$", re.IGNORECASE)
_STATED_AGAIN = re.compile(
    r"\b(?:score|rating|grade)\b[^\w\n]*(?:(?:is|are|of|would\s+be)\b)?[^\w\n]*?(-?\d+(?:\.\d+)?)", re.IGNORECASE
)


class ScoreForm:
    """The form in which a judge states its scores.

    Args:
        pattern: regular expression with one group, the score.
        low, high: ends of the scale, inclusive.
    """

    def __init__(self, pattern: str, low: float, high: float) -> None:
        self.low, self.high = low, high
        self._pattern = re.compile(pattern)
        self._announcement = _before_the_group(pattern)

    def read(self, answer: ChatAnswer) -> float | NoScore:
        """Read the score from an answer."""
        if answer.problem:
            return NoScore(answer.problem)
        text = after_thinking(answer.text)
        if text is None:
            return CUT
        if not text.strip():
            return EMPTY
        matches = list(self._pattern.finditer(text))
        if not matches or matches[-1][1] is None or self._is_announced_again(text, matches[-1].end()):
            return NO_SCORE
        try:
            score = float(matches[-1][1].replace("−", "-"))
        except ValueError:
            return NO_SCORE
        if (problem := self._problem_around(text, matches[-1])) is not None:
            return problem
        if _is_one_of_several(text, matches, score):
            return SEVERAL
        return score if self.low <= score <= self.high else OUTSIDE

    def _is_announced_again(self, text: str, start: int) -> bool:
        return self._announcement is not None and self._announcement.search(text, start) is not None

    def _problem_around(self, text: str, match: re.Match[str]) -> NoScore | None:
        """Reason why the text around the number makes it invalid, or ``None``.

        After the number, only the rest of the line up to a quotation mark counts: in JSON another field may follow.
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
        if _GOES_ON.match(behind) or _NUMBER_WORD.search(behind):
            return AMBIGUOUS
        return AMBIGUOUS if any(unicodedata.category(one).startswith("N") for one in behind) else None


def _is_one_of_several(text: str, matches: Sequence[re.Match[str]], score: float) -> bool:
    """Whether the last match, with value ``score``, may not be the intended score."""
    *earlier, last = (text[: match.start()].rpartition("\n")[2] for match in matches)  # the line before each match
    if _BOUND.search(last) or (any(map(_OVERALL.search, earlier)) and not _OVERALL.search(last)):
        return True
    again = _STATED_AGAIN.search(text[matches[-1].end() :].partition("\n")[2])
    return again is not None and float(again[1]) != score


def _before_the_group(pattern: str) -> re.Pattern[str] | None:
    """The pattern up to its group, which announces a score; ``None`` if it can match the empty string."""
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
