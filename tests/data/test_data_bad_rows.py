"""What is dropped or counted of a data set, and under which cause: bad rows, cut responses, weights, equal tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nemo_rao.batch import Response, Row
from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.overlap import shared_prompts
from nemo_rao.data.report import OTHER_CAUSES, LoadReport, Outcome, cause_of
from nemo_rao.data.row_checks import CUT_LEFT_OUT, CUT_SHORT, CUT_WITHOUT_END, RowChecks
from nemo_rao.data.sample_checks import EQUAL_TOKENS, EQUAL_TOKENS_OTHER_REWARDS, SAME_TOKENS, TOO_LONG
from nemo_rao.errors import UserError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
NEEDS_PAIRS = {"needs_preference": True, "needs_pairs": True, "min_responses": 2, "needed_by": "objective dpo"}


def record(prompt: str, *rewards: float | None, **fields: object) -> dict:
    return {
        "prompt": prompt,
        "responses": [{"content": f"Hello {k}", "reward": r} for k, r in enumerate(rewards)],
    } | fields


@pytest.fixture
def load(tokenizers, write_lines):
    def load(records, tokenizer="own", **options):
        return load_preferences(write_lines(records), tokenizers[tokenizer], **({"seq_length": 64} | options))

    return load


# ------------------------------------------------------------------------------------------------------ bad rows

BAD = [
    "{",
    json.dumps({"prompt": "x"}),
    json.dumps(record("x", 1, "five")),
    json.dumps(record("x", 1, None)),
    json.dumps(record("x", "six")),
    json.dumps(record("x", 0, 1, 1e30)),
    json.dumps(record("x")),
]


def test_bad_rows_are_dropped_and_counted_by_cause_with_the_first_of_each(load):
    good = [json.dumps(record(f"p{n}", 1, 0)) for n in range(3)]
    outcomes: list[Outcome] = []
    data = load(
        [good[0], *BAD, *good[1:]],
        bad_rows="drop",
        max_bad_rows=0.7,
        needs_rewards=True,
        needed_by="objective rao",
        observer=outcomes.append,
    )
    assert [sample.location.rpartition(" ")[2] for sample in data] == ["1", "9", "10"]
    report = data.report
    assert (report.rows_read, report.rows_kept, report.rows_bad) == (10, 3, 7)
    assert report.dropped == {}
    assert sorted(report.bad.values()) == [1, 1, 1, 1, 1, 2]
    cause = "field 'responses[].reward' must be a number"
    assert report.bad[cause] == 2 and "data.jsonl line 4: " in report.examples[cause]
    cause = "response N has no reward, but objective rao needs one"
    assert report.bad[cause] == 1 and "data.jsonl line 5: response 2 has no reward" in report.examples[cause]
    assert any("line 2: invalid JSON" in report.examples[cause] for cause in report.bad)
    assert "2 bad rows dropped (field 'responses[].reward' must be a number; first: " in str(report)
    assert len(outcomes) == 10
    assert sorted(outcome.reason for outcome in outcomes if outcome.reason) == sorted(
        cause for cause, rows in report.bad.items() for _ in range(rows)
    )
    unrewarded = next(outcome for outcome in outcomes if "line 5" in outcome.detail)
    assert unrewarded.read is not None and unrewarded.sample is not None


@pytest.mark.parametrize("bad", BAD)
def test_the_first_bad_row_stops_unless_they_are_dropped_and_always_where_none_may_be(bad, load):
    for options in ({}, {"bad_rows": "drop", "strict": True, "max_bad_rows": 1.0}):
        with pytest.raises(UserError, match=r"data.jsonl line 2: "):
            load([record("p", 1, 0), bad, "{"], needs_rewards=True, **options)


def test_a_row_that_the_chat_template_refuses_is_bad_and_those_around_it_are_kept(load, tokenizers):
    tokenizer = tokenizers["chatml"]
    template = tokenizer.chat_template
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    records = [record("a", 1, 0), record("x", 1, 0) | {"prompt": system}, record("b", 1, 0)]
    try:
        tokenizer.chat_template = refusing + template
        with pytest.raises(UserError, match=r"line 2: .*no system"):
            load(records, "chatml")
        data = load(records, "chatml", bad_rows="drop", max_bad_rows=0.5)
    finally:
        tokenizer.chat_template = template
    assert [sample.location.rpartition(" ")[2] for sample in data] == ["1", "3"]
    assert data.report.rows_bad == 1 and data.report.rows_read == 3


def test_a_share_of_bad_rows_above_the_key_stops_with_the_counts(load):
    records = [*(record(f"p{n}", 1, 0) for n in range(8)), *BAD[:2]]
    assert len(load(records, bad_rows="drop", max_bad_rows=0.2)) == 8
    with pytest.raises(UserError) as caught:
        load(records, bad_rows="drop", max_bad_rows=0.19)
    message = str(caught.value)
    assert "2 of 10 rows are bad, more than data.max_bad_rows=0.19 allows" in message and "\n" not in message
    assert message.count("1 bad row dropped (") == 2 and "line 9: " in message and "line 10: " in message
    with pytest.raises(UserError, match=r"no rows left to train on: 0 of 2 rows kept; 1 bad row"):
        load(BAD[:2], bad_rows="drop", max_bad_rows=1.0)


def test_a_row_that_is_dropped_for_its_length_is_not_bad(load):
    long = record("x", 1, None)
    long["responses"][0]["content"] = "word " * 80
    data = load([record("p", 1, 0), long], bad_rows="drop", needs_rewards=True, max_bad_rows=0.0)
    assert data.report.dropped == {TOO_LONG: 1} and data.report.bad == {}


@pytest.mark.parametrize(
    ("complaint", "cause"),
    [
        ("a b.jsonl line 7: field 'x[3].y' is empty. Drop the row or fill it in.", "field 'x[].y' is empty"),
        ("hf:a/b:train row 12: field 'score_1' must be a number, found text ('7')", "field 'score_1' must be a number"),
        (
            "f.jsonl line 2: has 1 responses, but objective rao needs at least 2 per prompt. Drop the row.",
            "has N responses, but objective rao needs at least N per prompt",
        ),
        ("f.jsonl line 2: not UTF-8 at byte 17 of the line. Rewrite it.", "not UTF-8 at byte N of the line"),
        ("f.jsonl: truncated .gz file", "f.jsonl: truncated .gz file"),
    ],
)
def test_a_cause_has_no_place_and_no_value(complaint, cause):
    assert cause_of(complaint) == cause


def test_causes_beyond_a_number_are_counted_together():
    report = LoadReport()
    for name in (f"field '{chr(97 + n)}' is empty" for n in range(25)):
        report.drop_bad(f"f.jsonl line 1: {name}")
    assert len(report.bad) == 21 and report.bad[OTHER_CAUSES] == 5 and report.rows_bad == 25


# --------------------------------------------------------------------------------- responses that were cut short


def checks(**options) -> RowChecks:
    return RowChecks(
        **{
            "num_responses": None,
            "min_responses": 1,
            "needs_rewards": False,
            "needs_preference": False,
            "needs_pairs": False,
            "needed_by": "o",
            "responses": "all",
            "pairs_by": "auto",
            "seed": 0,
            "truncated": "drop",
        }
        | options
    )


def cut_row(*cut: bool, ranked: bool = False) -> Row:
    return Row("p", tuple(Response(str(k), float(k), truncated=c) for k, c in enumerate(cut)), "f line 1", ranked)


def used(candidate) -> str | None:
    """The contents of the responses that are used; ``None`` of a row that is dropped."""
    return None if candidate.dropped else "".join(response.content for response in candidate.row.responses)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (cut_row(False, True, False), {}, "02"),
        (cut_row(True, True), {}, None),
        (cut_row(True, False, False), {"num_responses": 2}, "12"),
        (cut_row(False, True), {"min_responses": 2}, None),
        (cut_row(False, False, True, False, True), {"responses": "best_worst"}, "30"),
        (cut_row(False, True, ranked=True), {}, "0"),
        (cut_row(True, False, ranked=True), {}, None),  # the rejected one would become the best
        (cut_row(True, False, False, ranked=True), {}, "12"),
        (cut_row(True, False), {"truncated": "without_end"}, "01"),
        (cut_row(False, False), {}, "01"),
    ],
)
def test_responses_that_were_cut_are_left_out_before_others_are_chosen(row, options, expected):
    candidate = checks(**options).apply(row, 0)
    assert used(candidate) == expected
    if expected is None:
        assert candidate.dropped[0] == CUT_SHORT and "responses are marked as truncated" in candidate.dropped[1]
    elif any(response.truncated for response in row.responses):
        without_end = options.get("truncated") == "without_end"
        assert candidate.remarks == (CUT_WITHOUT_END if without_end else CUT_LEFT_OUT,)
        assert ("data.truncated=drop" in candidate.left_out) is not without_end


# ------------------------------------------------------------------------------------------------------- weights


def test_an_answer_of_weight_0_is_context_in_a_conversation_and_drops_the_row_elsewhere(load, tokenizers):
    def chat(*weights: int) -> dict:
        turns = [
            [{"role": "user", "content": f"u{k}"}, {"role": "assistant", "content": f"a{k}", "weight": weight}]
            for k, weight in enumerate(weights)
        ]
        return {"messages": [message for turn in turns for message in turn]}

    weighted = PAIR | {"chosen": [{"role": "assistant", "content": "good", "weight": 0}]}
    weighted["rejected"] = [{"role": "assistant", "content": "bad"}]
    data = load([chat(0, 1), chat(0), chat(0, 0), weighted], "chatml")
    (context,) = data
    learned = tokenizers["chatml"].decode(context.responses[0][context.answers[0]])
    assert "a1" in learned and "a0" not in learned
    assert list(data.report.dropped.values()) == [3] and "weight 0" in str(data.report)


# -------------------------------------------------------------------------------------------------- equal tokens


def rewarded(*answers: tuple[str, float]) -> dict:
    return {"prompt": "p", "responses": [{"content": content, "reward": reward} for content, reward in answers]}


@pytest.mark.parametrize(
    ("records", "options", "remarks", "dropped"),
    [
        ([rewarded(("x", 1), (" x ", 0))], {}, {EQUAL_TOKENS_OTHER_REWARDS: 1}, {}),
        ([rewarded(("x", 1), ("x", 1), ("y", 0))], {}, {EQUAL_TOKENS: 1}, {}),
        ([rewarded(("x", 1), ("y", 0))], {}, {}, {}),
        ([rewarded(("x", 1), (" x", 0))], NEEDS_PAIRS, {}, {SAME_TOKENS: 1}),
        ([PAIR | {"rejected": "good "}], NEEDS_PAIRS, {}, {SAME_TOKENS: 1}),
        ([PAIR | {"rejected": "good "}], {}, {EQUAL_TOKENS_OTHER_REWARDS: 1}, {}),
        (
            [rewarded(("x", 1), ("x ", 0.5), ("y", 0))],
            NEEDS_PAIRS | {"responses": "all"},
            {EQUAL_TOKENS_OTHER_REWARDS: 1},
            {},
        ),
        ([rewarded(("x", 1), ("y", 0.5), ("x ", 0))], NEEDS_PAIRS | {"responses": "best_worst"}, {}, {SAME_TOKENS: 1}),
    ],
)
def test_equal_tokens_are_counted_and_dropped_where_only_they_are_compared(records, options, remarks, dropped, load):
    data = load([record("a", 1, 0), *records], "llama_3", **options)
    assert data.report.remarks == remarks
    assert data.report.dropped == dropped
    assert len(data) == (1 if dropped else 2)
    if dropped:
        assert "data.jsonl line 2: responses 1 and 2 have the same tokens" in str(data.report)
        with pytest.raises(UserError, match=r"line 2: responses 1 and 2 .*strict"):
            load([record("a", 1, 0), *records], "llama_3", strict=True, **options)
    else:
        assert all(f"1 row: {remark} (first: " in str(data.report) for remark in remarks)


# ---------------------------------------------------------------------------------------------- what is said of it


def test_the_report_is_one_line_or_a_line_for_each_part_and_notes_are_said_once():
    report = LoadReport(rows_read=3, rows_kept=3)
    assert report.text(" (read from cache)") == "3 of 3 rows kept (read from cache)"
    report.not_used(["source", "completions[].model"])
    report.not_used(["source"])
    assert report.text() == "3 of 3 rows kept; unused fields: source (2 rows), completions[].model (1 row)"
    report.notes.append("tokenizer t: " + "a note of some length " * 4)
    first, *others = report.text(" (read from cache)").splitlines()
    assert first == "3 of 3 rows kept (read from cache)" and len(others) == 2
    assert report.text(already_reported=report.notes).count("\n") == 0
    assert "\n" not in str(report) and report.notes[0] in str(report)


def test_every_row_is_observed_with_what_became_of_it(load):
    long = record("x", 1, 0)
    long["responses"][1]["content"] = "word " * 80
    outcomes: list[Outcome] = []
    data = load(
        [record("a", 1, 0, 0.5), long, record("b", 2, 2)],
        responses="best_worst",
        needs_pairs=True,
        observer=outcomes.append,
    )
    kept, too_long, equal = outcomes
    assert kept.reason is None and kept.detail == "" and kept.left_out == ("data.responses=best_worst",)
    assert (len(kept.read.responses), len(kept.used.responses)) == (3, 2)
    assert np.array_equal(kept.sample.prompt, data[0].prompt)
    assert too_long.reason == TOO_LONG and "line 2" in too_long.detail and too_long.sample is not None
    assert equal.reason is not None and "line 3" in equal.detail


# --------------------------------------------------------------------------------------- training and validation


def test_validation_prompts_that_are_trained_on_are_counted_with_the_first(load, tmp_path):
    train = load([record("a", 1), record("b", 1), record("a", 0)])
    assert shared_prompts(train, load([record("c", 1), record("d", 1)])) is None
    shared = shared_prompts(train, load([record("c", 1), record("b", 0), record("a", 1), record("b", 1)]))
    assert (shared.prompts, shared.validation_prompts) == (3, 4)
    assert [location.rpartition(" ")[2] for location in shared.first] == ["2", "2"]
    assert str(shared).startswith("3 of 4 prompts are also prompts of the training data (first: ")
