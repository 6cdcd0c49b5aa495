"""Loading: what is kept, what is dropped and counted, what stops the run; and the flat store of samples."""

import re
from dataclasses import replace

import numpy as np
import pytest

from nemo_rao.batch import RewardSummary, Sample
from nemo_rao.data.choice import NO_PAIR
from nemo_rao.data.collate import collate
from nemo_rao.data.dataset import INNER_END, load_preferences
from nemo_rao.data.encode import BoundaryError, Encoder
from nemo_rao.data.mismatched import mismatched
from nemo_rao.data.row_checks import NOT_FINITE
from nemo_rao.data.sample_checks import PROMPT_TOO_LONG, TOO_LONG
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows


def record(prompt="Hi?", *rewards, content="Hello there {}"):
    entries = [{"content": content.format(i)} | ({} if r is None else {"reward": r}) for i, r in enumerate(rewards)]
    return {"prompt": prompt, "responses": entries}


def sample(prompt, *responses, rewards=None, location="p"):
    rewards = [0.0] * len(responses) if rewards is None else rewards
    arrays = tuple(np.array(response, np.int32) for response in responses)
    nothing = np.zeros((len(arrays), 0)), np.zeros(0)
    return Sample(np.array(prompt, np.int32), arrays, np.array(rewards, np.float64), False, location, *nothing)


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
        assert (ours.ranked, ours.location) == (theirs.ranked, theirs.location)
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
    same = PreferenceData([sample([1, 2], [3, 4], [5], rewards=[1, 2], location="q"), sample([1], [6])])
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


PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
FOUR = record("x", 0.25, 0.75, 0.0, 0.5)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([FOUR], {}, "1 of 1 rows kept"),
        ([FOUR], {"num_responses": 2}, "2 of 4 responses per prompt are used (data.num_responses=2)"),
        (
            [FOUR, record("y", 1.0), PAIR],
            {"num_responses": 2},
            "1 to 2 of 1 to 4 responses per prompt are used (data.num_responses=2)",
        ),
        (
            [FOUR],
            {"num_responses": 3, "responses": "best_worst"},
            "2 of 4 responses per prompt are used (data.num_responses=3 and data.responses=best_worst)",
        ),
        (
            [FOUR],
            {"responses": "best_worst", "needs_pairs": True},
            "2 of 4 responses per prompt are used (data.responses=best_worst); pairs: best and worst by reward",
        ),
        (
            [FOUR],
            {"responses": "best_random", "needs_pairs": True},
            "(data.responses=best_random); pairs: best and a worse one at random, by reward",
        ),
        ([PAIR], {"responses": "best_worst", "needs_pairs": True}, "kept; pairs: chosen and rejected by label"),
        ([FOUR], {"responses": "all", "needs_pairs": True}, "kept; pairs: every two by reward"),
        (
            [PAIR, PAIR | {"prompt": "q"}, FOUR],
            {"responses": "best_worst", "needs_pairs": True},
            "pairs: chosen and rejected by label (2 rows), best and worst by reward (1 row)",
        ),
    ],
)
def test_the_report_says_which_responses_are_used_and_compared(load, rows, options, said):
    assert str(load(rows, **options).report).endswith(said)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_is_refused_where_it_is_used_and_counted_where_labels_do(load, score):
    row = PAIR | {"score_chosen": score, "score_rejected": 0.5}
    data = load([row], needs_preference=True, needs_pairs=True, min_responses=2)
    assert np.isnan(data[0].rewards[0]) and data[0].rewards[1] == 0.5
    assert data.report.remarks == {NOT_FINITE: 1}
    for used in ({"needs_rewards": True}, {"pairs_by": "reward"}):
        with pytest.raises(UserError, match=r"data.jsonl line 1: response 1 has a reward that is not a finite number"):
            load([row], **used)


def test_a_row_of_exactly_seq_length_is_kept(load):
    exact = load(RECORDS).max_length
    assert load(RECORDS, seq_length=exact).report.dropped == {}
    assert load(RECORDS, seq_length=exact - 1).report.dropped != {}


def test_rows_without_a_boundary_are_dropped_and_counted(load):
    data = load([RECORDS[0], record("x", 1, content="\n\n\nmerges")], tokenizer="chatml")
    assert data.report.dropped == {BoundaryError.reason: 1}
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
    assert load([record("x", 1, content="a<|end|>b"), RECORDS[0]]).report.remarks == {INNER_END: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_responses": 2}, r"data.jsonl line 2: has 1 responses, but objective rao needs at least 2 per prompt"),
        ({"min_responses": 3, "num_responses": 2}, r"num_responses is 2, but objective rao needs at least 3"),
        ({"needs_rewards": True}, r"data.jsonl line 4: response 2 has no reward, but objective rao needs one"),
        ({"seq_length": 4}, r"data.jsonl: no rows left to train on: 0 of 4 rows kept; 4 dropped \(prompt alone"),
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
    with pytest.raises(UserError, match=r"data.jsonl: no rows left to train on: 0 of 0 rows kept"):
        load([])


# ------------------------------------------------------------------------------------------- what rewards are like

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
SCORED = PAIR | {"score_chosen": 3, "score_rejected": -1}


@pytest.mark.parametrize(
    ("records", "summary"),
    [
        ([record("a", 4, 1), record("b", -2)], RewardSummary(mean=0.25, low=-2, high=4)),
        ([record("a", 1, 0), record("b", 1)], RewardSummary(mean=0.75, low=0, high=1, all_labels=True)),
        ([record("a", 1, 0), record("b", 0.5)], RewardSummary(mean=0.5, low=0, high=1)),
        ([record("a", 1, None), record("b", 0)], RewardSummary(mean=0.5, low=0, high=1)),  # one has no label
        ([PAIR, PAIR], RewardSummary(all_ranked=True)),
        ([PAIR, record("a", None)], RewardSummary()),
        ([SCORED, PAIR], RewardSummary(mean=1, low=-1, high=3, all_ranked=True)),
        ([SCORED, record("a", 7)], RewardSummary(mean=4, low=-1, high=7)),
        (
            [PAIR | {"score_chosen": 1, "score_rejected": 0}],
            RewardSummary(mean=0.5, low=0, high=1, all_labels=True, all_ranked=True),
        ),
        (
            [{"prompt": "p", "completion": "x", "label": True}, {"prompt": "q", "completion": "y", "label": False}],
            RewardSummary(mean=0.5, low=0, high=1, all_labels=True),
        ),
    ],
)
def test_the_reward_summary_has_mean_range_and_whether_all_are_labels_or_ranked(records, summary, load):
    assert load(records).reward_summary() == summary


def test_the_reward_summary_is_of_what_is_kept(load):
    long = record("x", 100, 0, content="word " * 80 + "{}")
    data = load([long, record("a", 3, 1, 2)], responses="best_worst")
    assert data.reward_summary() == RewardSummary(mean=2, low=1, high=3)


# ------------------------------------------------------------------------------------------------ rows without a pair

EQUAL = record("same", 0.5, 0.5, 0.5)


def test_rows_of_equal_rewards_are_dropped_and_counted_where_pairs_are_needed(load):
    scored_alike = PAIR | {"score_chosen": 1, "score_rejected": 1}  # its labels make the pair
    records = [RECORDS[0], EQUAL, scored_alike, PAIR, EQUAL]
    data = load(records, needs_pairs=True)
    assert [sample.location.rpartition(" ")[2] for sample in data] == ["1", "3", "4"]
    assert (data.report.rows_read, data.report.rows_kept, data.report.dropped) == (5, 3, {NO_PAIR: 2})
    message = "2 dropped (no response better than another; first: "
    assert message in str(data.report)
    assert "data.jsonl line 2: all responses have the same reward)" in str(data.report)
    assert len(load(records)) == 5


def test_a_pair_counts_as_one_by_its_rewards_where_these_are_to_decide(load):
    scored_alike = PAIR | {"score_chosen": 1, "score_rejected": 1}
    data = load([scored_alike, SCORED], needs_pairs=True, pairs_by="reward")
    assert data.report.dropped == {NO_PAIR: 1} and data[0].rewards.tolist() == [3.0, -1.0]


def test_only_the_responses_that_are_used_can_make_a_pair(load):
    later = record("x", 0.5, 0.5, 1.0)
    assert load([later, RECORDS[0]], needs_pairs=True, num_responses=2).report.dropped == {NO_PAIR: 1}
    assert load([later, RECORDS[0]], needs_pairs=True).report.dropped == {}


def test_strict_stops_at_a_row_without_a_pair(load):
    with pytest.raises(UserError, match=r"data.jsonl line 2: all responses have the same reward \(strict"):
        load([RECORDS[0], EQUAL], needs_pairs=True, strict=True)
    assert len(load([RECORDS[0], EQUAL], strict=True)) == 2


def test_data_without_any_pair_is_refused(load):
    with pytest.raises(UserError, match=r"no rows left to train on: .*2 dropped \(no response better than another"):
        load([EQUAL, EQUAL], needs_pairs=True)


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        (record("x", None, None), {"needs_preference": True}, "neither an order .* nor a reward each, and objective o"),
        (record("x", 1, None), {"needs_preference": True}, "neither an order .* Add rewards .*data.reward_field"),
        (PAIR, {"needs_rewards": True}, "response 1 has no reward, but objective o needs one. Add score_chosen and"),
        (
            record("x", None),
            {"needs_rewards": True},
            "response 1 has no reward, but objective o needs one. Add it, or set data.reward_field",
        ),
        (record("x", 1, 0), {"pairs_by": "label"}, "has no labels"),
        (PAIR, {"pairs_by": "reward"}, "response 1 has no reward, and data.pairs_by is reward"),
        (record("x", 1, None, 0), {"responses": "best_worst"}, "response 2 has no reward, and data.responses is best"),
        (record("x", 1, None, 0), {"responses": "best_random"}, "response 2 has no reward, and data.responses is best"),
    ],
)
def test_a_row_that_cannot_be_compared_or_rewarded_as_asked_is_named(bad, options, message, load):
    fine = PAIR if options.get("pairs_by") == "label" else record("f", 1, 0)
    with pytest.raises(UserError, match=f"data.jsonl line 2: .*{message}"):
        load([fine, bad], needed_by="objective o", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"needs_rewards": True},
        {"needs_preference": True, "needs_pairs": True},
        {"responses": "best_worst"},
        {"pairs_by": "reward"},
    ],
    ids=["rewards", "preference", "choice", "order"],
)
def test_a_row_dropped_for_its_length_needs_no_reward(options, load):
    long = {"content": "word " * 80, "reward": None}
    unscored = {"prompt": "x", "responses": [{"content": "short", "reward": 1}, long, {"content": "b", "reward": 0}]}
    data = load([record("a", 1, 0), unscored], **options)
    assert data.report.dropped == {TOO_LONG: 1} and len(data) == 1
    with pytest.raises(UserError, match=r"line 2: prompt and response 2 have .*strict"):
        load([record("a", 1, 0), unscored], strict=True, **options)


def test_labels_alone_are_a_preference_and_a_row_of_rewards_one_too(load):
    assert len(load([PAIR, record("x", 1, 0)], needs_preference=True, needs_pairs=True, min_responses=2)) == 2


# ------------------------------------------------------------------------------- ensembles and rewards of the reference


def ensemble_record(prompt, *members, **fields):
    entries = [{"content": f"Hello there {at}", "a": a, "b": b} for at, (a, b) in enumerate(members)]
    return {"prompt": prompt, "responses": entries} | fields


ENSEMBLES = [
    ensemble_record("a", (1, 2), (3, 5), (0, -4), reference_rewards=[0.5, 1.5]),
    ensemble_record("b", (7, 8)),
    ensemble_record("c", (6, 6), (9, 1), reference_rewards=[4, 3, 2]),
]


def test_ensembles_and_reference_rewards_stay_with_their_sample(load):
    data = load(ENSEMBLES, reward_field=["a", "b"])
    for index, expected in (
        (0, [[1, 2], [3, 5], [0, -4]]),
        (1, [[7, 8]]),
        (2, [[6, 6], [9, 1]]),
        (-1, [[6, 6], [9, 1]]),
    ):
        assert data[index].ensemble.tolist() == expected
        assert data[index].rewards.tolist() == [sum(pair) / 2 for pair in expected]
    assert [sample.reference_rewards.tolist() for sample in data] == [[0.5, 1.5], [], [4.0, 3.0, 2.0]]
    for values in (data[0].ensemble, data[0].reference_rewards):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0
    without = load(RECORDS)
    assert [sample.ensemble.shape for sample in without] == [(3, 0), (1, 0), (2, 0)]
    assert all(sample.reference_rewards.size == 0 for sample in without)


@pytest.mark.parametrize("null", [None, {"Rating": None}, {"Rating": "N/A"}])
def test_an_ensemble_with_a_null_is_refused_where_rewards_are_needed(null, load):
    def rated(rating):
        return {"instruction": "a", "completions": [{"response": "x", "help": 1, "honesty": rating}]}

    field = ["help", "honesty" if null is None else "honesty.Rating"]
    records = [rated(2 if null is None else {"Rating": "2"}), rated(null)]
    assert load(records[:1], needs_rewards=True, reward_field=field)[0].ensemble.tolist() == [[1, 2]]
    with pytest.raises(UserError, match=r"data\.jsonl line 2: "):
        load(records, needs_rewards=True, reward_field=field)


def test_an_ensembles_rewards_follow_the_responses_that_are_used(load):
    data = load(ENSEMBLES, reward_field=["a", "b"], responses="best_worst")
    assert data[0].ensemble.tolist() == [[3, 5], [0, -4]]
    assert data[2].ensemble.tolist() == [[6, 6], [9, 1]]


def test_a_micro_batch_of_loaded_data_holds_ensembles_by_response_and_reference_rewards_by_prompt(load):
    data = load(ENSEMBLES, reward_field=["a", "b"])
    batch = collate([data[2], data[1], data[0]], [data.response_offset(index) for index in (2, 1, 0)], pad_token_id=0)
    assert batch.reward_ensemble.tolist() == [[6, 6], [9, 1], [7, 8], [1, 2], [3, 5], [0, -4]]
    assert batch.rewards.tolist() == [6, 5, 7.5, 1.5, 4, -2]
    nothing = float("nan")
    expected = np.array([[4, 3, 2], [nothing] * 3, [0.5, 1.5, nothing]], dtype=np.float32)
    assert np.array_equal(batch.reference_rewards.numpy(), expected, equal_nan=True)
    assert collate([data[1]], [0], pad_token_id=0).reference_rewards is None
    assert collate(list(load(RECORDS)), [0, 3, 4], pad_token_id=0).reward_ensemble is None


# ------------------------------------------------------------------------------------------------ mismatched responses


def numbered(size):
    """Prompts [1000 + n], each with 1 to 3 responses, whose tokens tell where they come from: 10 n + k, twice."""
    return PreferenceData(
        sample([1000 + n, 1], *([10 * n + k] * 2 for k in range(1 + n % 3)), location=f"line {n}") for n in range(size)
    )


def sources(data):
    """Of each prompt, (where its response comes from, which one it is there)."""
    return [divmod(int(sample.responses[0][0]), 10) for sample in data]


@pytest.mark.parametrize("size", [2, 3, 4, 11])
def test_every_prompt_is_given_one_response_to_another_and_every_prompt_gives_one(size):
    for seed in range(20):
        data = mismatched(numbered(size), seq_length=64, seed=seed)
        assert [sample.prompt.tolist() for sample in data] == [[1000 + n, 1] for n in range(size)]
        assert [sample.location for sample in data] == [f"line {n}" for n in range(size)]
        assert all(len(sample.responses) == 1 and len(sample.responses[0]) == 2 for sample in data)
        others = [source for source, _ in sources(data)]
        assert all(source != n for n, source in enumerate(others))
        assert sorted(others) == list(range(size))
        assert all(response <= source % 3 for source, response in sources(data))


def test_mismatched_responses_are_the_same_for_the_same_seed_and_others_for_another():
    data = numbered(12)
    drawn = [mismatched(data, seq_length=64, seed=seed).fingerprint() for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_any_response_of_the_other_prompt_may_be_drawn():
    drawn = [sources(mismatched(numbered(3), seq_length=64, seed=seed))[1] for seed in range(60)]
    assert set(drawn) == {(0, 0), (2, 0), (2, 1), (2, 2)}


def test_a_mismatched_response_is_cut_at_seq_length_and_no_sooner():
    data = PreferenceData([sample([1] * 6, [10, 11]), sample([2], [20, 21, 22, 23, 24, 25, 26])])
    for seq_length, first in ((13, 7), (10, 4), (8, 2), (7, 1)):
        cut = mismatched(data, seq_length=seq_length, seed=0)
        assert cut[0].responses[0].tolist() == [20, 21, 22, 23, 24, 25, 26][:first]
        assert cut[1].responses[0].tolist() == [10, 11]
        assert cut.max_length <= seq_length


def test_mismatched_responses_have_no_reward_of_any_kind_and_no_rank(load):
    for data in (load(ENSEMBLES, reward_field=["a", "b"]), load([SCORED, PAIR | {"prompt": "q"}])):
        for made in mismatched(data, seq_length=64, seed=0):
            assert np.isnan(made.rewards).all() and made.rewards.shape == (1,)
            assert (made.ranked, made.ensemble.shape, made.reference_rewards.size) == (False, (1, 0), 0)


def test_one_prompt_alone_is_refused_with_its_place(load):
    with pytest.raises(UserError, match=r"data.jsonl line 2: the only prompt left, .*. Add data"):
        mismatched(load([record("word " * 80, 1), RECORDS[0]]), seq_length=64, seed=0)


def test_a_conversations_answers_stay_with_it_and_count_for_the_fingerprint(load):
    from nemo_rao.data.collate import collate

    turns = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello there 1"},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello there 2"},
    ]
    data = load([record("a", 0.5), {"messages": turns}])
    assert data[0].answers is None
    (marked,) = data[1].answers
    assert len(marked) == len(data[1].responses[0]) and marked[0] and marked[-1] and not marked.all()
    batch = collate([data[0], data[1]], [0, 1], pad_token_id=0)
    start = batch.tokens.shape[1] + len(data[1].prompt) - 1
    assert batch.response_positions[1][: marked.sum()].tolist() == (start + marked.nonzero()[0]).tolist()
    assert (batch.response_positions[1] >= 0).sum() == marked.sum()
    whole = PreferenceData([replace(data[1], answers=None)])
    assert whole.fingerprint() != PreferenceData([data[1]]).fingerprint()
