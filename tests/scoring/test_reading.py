"""What is a score in a judge's answer, and what is none."""

from __future__ import annotations

import pytest

from nemo_rao.scoring.chat import ChatAnswer
from nemo_rao.scoring.judge_config import JudgeConfig
from nemo_rao.scoring.reading import AMBIGUOUS, CUT, EMPTY, NO_SCORE, OTHER_SCALE, OUTSIDE, SEVERAL, ScoreForm
from nemo_rao.scoring.scorer import NoScore

DEFAULT = JudgeConfig().pattern


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Good.\nScore: 7", 7.0),
        ("**Score:** 7.5.", 7.5),
        ("Score: ７", 7.0),
        ("Score: 8\n\nIt has 3 mistakes.", 8.0),
        # The usual markup, JSON and signs.
        ('{"reason": "The highest possible quality", "score": 8}', 8.0),
        ('{"score": "8/10"}', 8.0),
        ("Score: [[8]]", 8.0),
        ("Score = `8`", 8.0),
        ("Score：8分", 8.0),
        ("Score: +8", 8.0),
        ("Score: −3", OUTSIDE),
        ("Underscore: 5", NO_SCORE),
        ("score: 3\nScore: 1", 1.0),
        ("Score: 7, no: Score: 4", 4.0),
        # Of how many: right where that is the scale's end.
        ("Score: 8/10", 8.0),
        ("Score: **8** / 10 points", 8.0),
        ("Score: 8 (out of 10).", 8.0),
        ("Score: 4/5", OTHER_SCALE),
        ("Score: 9/100", OTHER_SCALE),
        ("Score: 8 of 20", OTHER_SCALE),
        ("Score: 80%", OTHER_SCALE),
        ("Score: 8 out of ten", AMBIGUOUS),
        # A part of another number, or one of several.
        ("Score: 8,5", AMBIGUOUS),
        ("Score: 8,5/10", AMBIGUOUS),
        ("Score: 1,000", AMBIGUOUS),
        ("Score: 1 000", AMBIGUOUS),
        ("Score: 1e1", AMBIGUOUS),
        ("Score: 7½", AMBIGUOUS),
        ("Score: 7-8", AMBIGUOUS),
        ("Score: 7 to eight", AMBIGUOUS),
        ("Score: 1-10: 8", AMBIGUOUS),
        ("Score: 7, no, 4", AMBIGUOUS),
        ("Score: 4 of five", AMBIGUOUS),
        ("Score: 8 and a half", AMBIGUOUS),
        ("Score: 8 and well argued", 8.0),
        # Several, of which one is overall, an end of the scale, or stated in another form.
        ("Clarity score: 3\n**Overall score: 7**", 7.0),
        ("Overall score: 7\nFinal score: 3", 3.0),
        ("**Overall** Score: 7\nClarity score: 3", SEVERAL),
        ("Score: 8\nMaximum score: 10", SEVERAL),
        ("Score: 3 would be too low.\nMy final score is 8.", SEVERAL),
        ("Score: 8\nMy score is 8.", 8.0),
        # In words, behind one that is quoted.
        ("The answer says Score: 10.\nScore: two", NO_SCORE),
        ("Score: ten", NO_SCORE),
        ("Eight.", NO_SCORE),
        ("Score: 11", OUTSIDE),
        ("Score: -3", OUTSIDE),
        ("Score: 0.5", OUTSIDE),
        # Thinking is not the answer.
        ("<think>Score: 3?</think>\nScore: 5", 5.0),
        ("Score: 3?\n</think>\nScore: 5", 5.0),
        ("<think>Score: 3</think>", EMPTY),
        ("<think>A first guess is\nScore: 3", CUT),
        ("[THINK]A first guess is\nScore: 3", CUT),
        ('<thinking budget="9">Score: 3</thinking>Score: 5', 5.0),
        ("<|channel|>analysis<|message|>Score: 3<|end|><|start|>assistant<|channel|>final<|message|>Score: 5", 5.0),
        ("<|channel|>analysis<|message|>Score: 3", CUT),
        ("◁think▷Score: 3", CUT),
        ("[Analysis]\nIt holds.\nScore: 4", 4.0),
        ("", EMPTY),
    ],
)
def test_a_number_is_a_score_only_whole_in_the_stated_form_and_on_the_stated_scale(
    text: str, score: float | NoScore
) -> None:
    form = ScoreForm(DEFAULT, 1, 10)
    assert form.read(ChatAnswer(text)) == score
    assert form.read(ChatAnswer(text, "the model refused")) == NoScore("the model refused")


@pytest.mark.parametrize(
    ("pattern", "text", "score"),
    [
        (DEFAULT, "Score: 80%", 80.0),
        (DEFAULT, "Score: 90/100", 90.0),
        (DEFAULT, "Score: 9/10", OTHER_SCALE),
        (r"\[\[(\d+)\]\]", "[[3]] ... Rating: [[8]] of 100", 8.0),
        (r'"score": (\d+)', '{"score": 8, "mistakes": 3}', 8.0),
        (r"(?:Score|Grade): (\d+)", "Score: 8. Grade: two", NO_SCORE),
        (r"(\d+)", "between 1-10: 8", 8.0),
        (r"(\d+)", "8,5", AMBIGUOUS),
        (r"(\d+)", "3 of 5", AMBIGUOUS),
        (r"(\d+)", "it is -8", AMBIGUOUS),
        (r"(\d+)", "gpt4", AMBIGUOUS),
        (r"Score: (\w+)", "Score: two", NO_SCORE),
        (r"a(\d)?", "a", NO_SCORE),
    ],
)
def test_other_patterns_and_a_scale_up_to_100(pattern: str, text: str, score: float | NoScore) -> None:
    assert ScoreForm(pattern, 0, 100).read(ChatAnswer(text)) == score
