"""Loading: what is kept, what is dropped and counted, what stops the run; and the flat store of samples."""

import re

import numpy as np
import pytest

from nemo_rao.batch import RewardSummary, Sample
from nemo_rao.data.dataset import NO_BOUNDARY, PROMPT_TOO_LONG, TOO_LONG, PreferenceData, load_preferences
from nemo_rao.data.encode import Encoder
from nemo_rao.data.rows import read_rows
from nemo_rao.errors import UserError


def record(prompt="Hi?", *rewards, content="Hello there {}"):
    entries = [{"content": content.format(i)} | ({} if r is None else {"reward": r}) for i, r in enumerate(rewards)]
    return {"prompt": prompt, "responses": entries}


def sample(prompt, *responses, rewards=None, place="p"):
    rewards = [0.0] * len(responses) if rewards is None else rewards
    arrays = tuple(np.array(response, np.int32) for response in responses)
    nothing = np.zeros((len(arrays), 0)), np.zeros(0)
    return Sample(np.array(prompt, np.int32), arrays, np.array(rewards, np.float64), False, place, *nothing)


RECORDS = [record("a", 1, 0.5, 0), record("b c d", 0.25), record("e", 0.5, 0.75)]


@pytest.fixture
def load(tokenizers, write_lines):
    def load(records, tokenizer="own", **options):
        return load_preferences(write_lines(records), tokenizers[tokenizer], **({"seq_length": 64} | options))

    return load


def test_the_store_gives_back_every_sample(load, tokenizers, write_lines):
    data = load(RECORDS)
    encoder = Encoder(tokenizers["own"])
    expected = [encoder.encode(row) for row in read_rows(write_lines(RECORDS))]
    assert len(data) == len(expected) == 3
    for ours, theirs in zip(data, expected, strict=True):
        assert np.array_equal(ours.prompt, theirs.prompt)
        assert all(np.array_equal(a, b) for a, b in zip(ours.responses, theirs.responses, strict=True))
        assert np.array_equal(ours.rewards, theirs.rewards)
        assert (ours.ranked, ours.place) == (theirs.ranked, theirs.place)
    assert data.num_responses == 6
    assert [data.response_offset(i) for i in range(3)] == [0, 3, 4]
    assert data.max_length == max(len(s.prompt) + max(map(len, s.responses)) for s in expected)
    assert np.array_equal(data[-1].prompt, data[2].prompt)
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="read-only"):
        data[0].prompt[0] = 5


def test_reward_mean_counts_each_prompt_once(load):
    assert load(RECORDS).reward_summary().mean == pytest.approx((0.5 + 0.25 + 0.625) / 3)
    assert load([*RECORDS, record("x", None, 1.0), record("y", None)]).reward_summary().mean == pytest.approx(
        (0.5 + 0.25 + 0.625 + 1.0) / 4
    )
    assert load([record("x", None)]).reward_summary() == RewardSummary()


def test_the_fingerprint_sees_tokens_boundaries_and_order_but_not_rewards():
    base = PreferenceData([sample([1, 2], [3, 4], [5]), sample([1], [6])])
    assert re.fullmatch(r"[0-9a-f]{64}", base.fingerprint())
    same = PreferenceData([sample([1, 2], [3, 4], [5], rewards=[1, 2], place="q"), sample([1], [6])])
    assert same.fingerprint() == base.fingerprint()
    others = [
        [sample([1, 2], [3, 4], [7]), sample([1], [6])],  # a token
        [sample([1, 2, 3], [4], [5]), sample([1], [6])],  # a boundary between prompt and response
        [sample([1, 2], [3], [4, 5]), sample([1], [6])],  # between responses
        [sample([1, 2], [3, 4], [5], [1]), sample([6], [6])],
        [sample([1], [6]), sample([1, 2], [3, 4], [5])],  # the order
    ]
    assert len({PreferenceData(samples).fingerprint() for samples in others} | {base.fingerprint()}) == 6


def test_num_responses_keeps_the_first_and_leaves_pairs_alone(load):
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    data = load([*RECORDS, pair], num_responses=1)
    assert [len(s.responses) for s in data] == [1, 1, 1, 2]
    assert data[0].rewards.tolist() == [1.0]
    assert [s.ranked for s in data] == [False, False, False, True]


def test_rows_too_long_are_dropped_whole_and_counted(load):
    long_prompt, long_answer = record("word " * 80, 1, 0), record("x", 1, 0)
    long_answer["responses"][1]["content"] = "word " * 80
    seen: list[int] = []
    data = load([long_prompt, RECORDS[0], long_answer, RECORDS[1]], progress=seen.append)
    assert len(data) == 2
    assert (data.report.rows_read, data.report.rows_kept) == (4, 2)
    assert data.report.dropped == {PROMPT_TOO_LONG: 1, TOO_LONG: 1}
    assert "data.jsonl line 1: the prompt has" in data.report.examples[PROMPT_TOO_LONG]
    assert "data.jsonl line 3: prompt and response 2 have" in data.report.examples[TOO_LONG]
    assert str(data.report).startswith("2 of 4 rows kept; 1 dropped (prompt alone")
    assert seen == [4]
    # what is not kept cannot be too long
    assert len(load([long_answer], num_responses=1)) == 1


def test_a_row_of_exactly_seq_length_is_kept(load):
    exact = load(RECORDS).max_length
    assert load(RECORDS, seq_length=exact).report.dropped == {}
    assert load(RECORDS, seq_length=exact - 1).report.dropped != {}


def test_rows_without_a_boundary_are_dropped_and_counted(load):
    data = load([RECORDS[0], record("x", 1, content="\n\n\nmerges")], tokenizer="chatml")
    assert data.report.dropped == {NO_BOUNDARY: 1}
    assert "data.jsonl line 2: response 1 has no boundary" in str(data.report)


@pytest.mark.parametrize(
    ("bad", "tokenizer", "complaint"),
    [
        (record("word " * 80, 1), "own", "line 2: the prompt has"),
        (record("x", 1, content="word " * 80), "own", "line 2: prompt and response 1 have"),
        (record("x", 1, content="\n\n\nmerges"), "chatml", "line 2: response 1 has no boundary"),
    ],
)
def test_strict_stops_at_the_first_row_that_would_be_dropped(bad, tokenizer, complaint, load):
    with pytest.raises(UserError, match=rf"data.jsonl {complaint}.*strict"):
        load([RECORDS[0], bad], tokenizer=tokenizer, strict=True)


def test_an_end_token_inside_a_response_is_counted(load):
    assert load([record("x", 1, content="a<|end|>b"), RECORDS[0]]).report.inner_ends == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_responses": 2}, r"data.jsonl line 2: has 1 responses, objective rao needs at least 2 a prompt"),
        ({"min_responses": 3, "num_responses": 2}, r"num_responses is 2, but objective rao needs at least 3"),
        ({"needs_rewards": True}, r"data.jsonl line 4: response 2 has no reward, which objective rao needs"),
        ({"seq_length": 4}, r"data.jsonl: no rows left to train on; 0 of 4 rows kept; 4 dropped \(prompt alone"),
    ],
)
def test_data_that_the_objective_cannot_use_is_refused(options, message, load):
    with pytest.raises(UserError, match=message):
        load([*RECORDS, record("f", 1, None)], needed_by="objective rao", **options)


def test_prompts_with_different_first_tokens_are_refused_with_both_rows(load, tokenizer_folder, tokenizers):
    records = [record("a\n", 1), record("a b\n", 1), record("Hello\n", 1)]
    assert len(load(records, tokenizer="plain", needs_shared_first_token=True)) == 3  # all begin with <|begin|>
    bare = tokenizers["plain"].__class__.from_pretrained(tokenizer_folder)
    bare.chat_template = None
    bare._tokenizer.post_processor = None
    with pytest.raises(UserError, match=r"rao needs .*data.jsonl line 1 begins with 'a' and .*line 3 with 'Hello'"):
        tokenizers["bare"] = bare
        load(records, tokenizer="bare", needs_shared_first_token=True, needed_by="objective rao")
    assert len(load(records, tokenizer="bare")) == 3


def test_an_empty_file_is_refused(load):
    with pytest.raises(UserError, match=r"data.jsonl: no rows left to train on; 0 of 0 rows kept"):
        load([])
