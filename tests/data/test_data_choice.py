"""Which responses of a prompt are used and what makes one better: the choice itself, in loading, as objectives ask."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rao.batch import Response, Row
from nemo_rao.config.compose import compose
from nemo_rao.data.choice import choose_responses, first_responses, has_pair, prefer_by
from nemo_rao.data.dataset import load_preferences
from nemo_rao.errors import UserError
from nemo_rao.loop.prepared import Prepared
from nemo_rao.training.prepare import prepare


def row(*rewards: float | None, ranked: bool = False) -> Row:
    """Responses named 0, 1, ... with these rewards."""
    return Row("p", tuple(Response(str(at), reward) for at, reward in enumerate(rewards)), "f.jsonl line 7", ranked)


def chosen(row: Row, responses: str, seed: int = 0, number: int = 0) -> list[int]:
    """Which responses are used, in their order."""
    return [int(response.content) for response in choose_responses(row, responses, seed=seed, number=number).responses]


# ----------------------------------------------------------------------------------------------- which are used


def test_all_leaves_a_row_as_it_is():
    for whole in (row(1), row(0, 1), row(0.5, None, 1)):
        assert choose_responses(whole, "all", seed=0, number=0) is whole


@pytest.mark.parametrize("responses", ["best_worst", "best_random"])
def test_one_or_two_responses_are_left_in_their_order_even_without_rewards(responses):
    for few in (row(1), row(None), row(0, 1), row(2, 2), row(None, 1), row(None, None, ranked=True)):
        assert choose_responses(few, responses, seed=0, number=0) is few


@pytest.mark.parametrize(
    ("rewards", "used"),
    [
        ((0.5, 0, 0.25, 1), [3, 1]),
        ((1, 0.5, 0), [0, 2]),
        ((-3, -1, -2), [1, 0]),
        ((0, 3, 3, 1, 0), [1, 0]),  # of equal ones the first
        ((2, 1, 1), [0, 1]),
        ((2, 2, 2), [0, 1]),  # none is best
    ],
)
def test_best_worst_takes_the_best_and_the_worst_with_the_best_first(rewards, used):
    assert chosen(row(*rewards), "best_worst") == used


@pytest.mark.parametrize("rewards", [(0.0, 9.0, 5.0, 1.0), (None, None, None, None), (1.0, float("nan"), 2.0, None)])
def test_labels_decide_which_is_best_and_worst_whatever_the_rewards_are(rewards):
    labeled = row(*rewards, ranked=True)
    assert chosen(labeled, "best_worst") == [0, 3]
    draws = Counter(tuple(chosen(labeled, "best_random", number=number)) for number in range(300))
    assert set(draws) == {(0, 1), (0, 2), (0, 3)} and min(draws.values()) > 60  # of 100 expected
    if rewards == (0.0, 9.0, 5.0, 1.0):
        assert chosen(prefer_by(labeled, "reward"), "best_worst") == [1, 0]


def test_the_first_responses_are_at_least_two_of_labeled_ones():
    whole = row(0, 1, 2, 3, ranked=True)
    used = [len(first_responses(whole, number).responses) for number in (None, 1, 2, 3, 9)]
    assert used == [4, 2, 2, 3, 4]
    assert len(first_responses(row(0, 1, 2), 1).responses) == 1


def test_what_is_used_keeps_its_rewards_and_the_row_its_prompt_and_place():
    members = [(0.0, 1.0), (2.0, 4.0), (1.0, 0.0)]
    ensemble = tuple(Response(str(at), sum(pair) / 2, pair) for at, pair in enumerate(members))
    whole = Row("p", ensemble, "f.jsonl line 7", reference_rewards=(0.5, 0.25))
    kept = choose_responses(whole, "best_worst", seed=0, number=0)
    assert kept == Row("p", (ensemble[1], ensemble[0]), "f.jsonl line 7", reference_rewards=(0.5, 0.25))


@given(
    rewards=st.lists(st.integers(-2, 2), min_size=3, max_size=8),
    seed=st.integers(0, 2**31),
    number=st.integers(0, 10**6),
)
def test_best_random_is_always_the_best_and_one_that_is_worse(rewards, seed, number):
    used = chosen(row(*rewards), "best_random", seed, number)
    if len(set(rewards)) == 1:
        assert used == [0, 1]
        return
    best, other = used
    assert best == rewards.index(max(rewards))
    assert rewards[other] < rewards[best]
    assert chosen(row(*rewards), "best_random", seed, number) == used


@pytest.mark.parametrize("of", ["rows", "seeds"])
def test_best_random_draws_each_worse_response_about_equally_often_over(of):
    whole = row(1, 5, 2, 5, 1)  # 1 is best, 3 its equal
    draws = [{"number": draw, "seed": 3} if of == "rows" else {"seed": draw, "number": 3} for draw in range(600)]
    counts = Counter(tuple(chosen(whole, "best_random", **draw)) for draw in draws)
    assert set(counts) == {(1, 0), (1, 2), (1, 4)}
    assert min(counts.values()) > 150  # of 200 expected; less than 1 in 10,000 at random


def test_best_random_draws_the_same_in_every_process():
    code = (
        "from nemo_rao.batch import Response, Row\nfrom nemo_rao.data.choice import choose_responses\n"
        "row = Row('p', tuple(Response(str(k), float(k)) for k in range(9)), 'f')\n"
        "print([int(choose_responses(row, 'best_random', seed=5, number=n).responses[1].content) for n in range(50)])"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        assert json.loads(done.stdout) == [chosen(row(*range(9)), "best_random", 5, number)[1] for number in range(50)]


@pytest.mark.parametrize("responses", ["best_worst", "best_random"])
def test_a_response_without_a_reward_to_choose_by_is_named(responses):
    with pytest.raises(UserError) as caught:
        choose_responses(row(1, None, 0), responses, seed=0, number=0)
    assert str(caught.value) == (
        f"f.jsonl line 7: response 2 has no reward, and data.responses is {responses}. Add it, or set "
        "data.reward_field to the field that holds it. data.bad_rows=drop drops and counts such rows."
    )


# ---------------------------------------------------------------------------------------------- what is better


def test_labels_and_rewards_are_left_to_decide_by_themselves_unless_one_is_chosen():
    for either in (row(0, 1), row(None, None), row(0, 1, ranked=True), row(None, None, ranked=True)):
        assert prefer_by(either, "auto") is either


def test_by_label_takes_labeled_rows_and_refuses_others():
    labeled = row(0, 1, ranked=True)
    assert prefer_by(labeled, "label") is labeled
    with pytest.raises(UserError, match=r"line 7: has no labels \(chosen, rejected\), but data.pairs_by is label"):
        prefer_by(row(1, 0), "label")


def test_by_reward_forgets_the_labels_and_nothing_else():
    assert prefer_by(row(0, 1, ranked=True), "reward") == row(0, 1)
    assert prefer_by(row(0, 1), "reward") == row(0, 1)


@pytest.mark.parametrize(
    ("lacking", "remedy"),
    [
        (row(0, None, ranked=True), "Add score_chosen and score_rejected"),
        (row(0, None), "Add it, or set data.reward_field to the field that holds it"),
    ],
)
def test_by_reward_refuses_a_row_without_one_and_says_where_it_belongs(lacking, remedy):
    with pytest.raises(UserError, match=f"line 7: response 2 has no reward, and data.pairs_by is reward. {remedy}"):
        prefer_by(lacking, "reward")


def test_there_is_a_pair_where_there_are_labels_or_different_rewards():
    assert has_pair(row(1, 0)) and has_pair(row(1, 1, 0.5))
    assert not has_pair(row(1, 1)) and not has_pair(row(0, 0, 0)) and not has_pair(row(1))
    assert not has_pair(row(1, ranked=True))
    assert has_pair(row(None, None, ranked=True)) and has_pair(row(1, 1, ranked=True))


# -------------------------------------------------------------------------------------------------- in loading

FOUR = {"prompt": "Hi?", "responses": [{"content": f"Hello {k}", "reward": r} for k, r in enumerate((2, 0, 4, 1))]}
PAIR = {"prompt": "Bye?", "chosen": "Bye!", "rejected": "What?", "score_chosen": 0, "score_rejected": 1}


@pytest.fixture
def load(tokenizers, write_lines):
    def load(records, **options):
        return load_preferences(write_lines(records), tokenizers["own"], **({"seq_length": 64} | options))

    return load


def test_loading_keeps_the_best_and_the_worst_and_every_pair_as_it_is(load):
    data = load([FOUR, PAIR], responses="best_worst")
    assert [sample.rewards.tolist() for sample in data] == [[4.0, 0.0], [0.0, 1.0]]
    assert [sample.ranked for sample in data] == [False, True]
    whole = load([FOUR])
    for ours, at in zip(data[0].responses, (2, 1), strict=True):
        assert np.array_equal(ours, whole[0].responses[at])


def test_num_responses_comes_before_the_choice(load):
    [sample] = load([FOUR], num_responses=3, responses="best_worst")
    assert sample.rewards.tolist() == [4.0, 0.0]
    [sample] = load([FOUR], num_responses=2, responses="best_worst")
    assert sample.rewards.tolist() == [2.0, 0.0]


def test_loading_draws_by_its_seed_and_the_number_of_each_row(load):
    number = 40
    expected = {seed: [chosen(row(2, 0, 4, 1), "best_random", seed, n)[1] for n in range(number)] for seed in (1, 2)}
    for seed, others in expected.items():
        data = load([FOUR] * number, responses="best_random", seed=seed)
        assert [sample.rewards.tolist() for sample in data] == [[4.0, float((2, 0, 4, 1)[k])] for k in others]
    assert expected[1] != expected[2]


def test_loading_by_reward_unranks_pairs_and_keeps_their_order(load):
    [sample] = load([PAIR], pairs_by="reward")
    assert (sample.ranked, sample.rewards.tolist()) == (False, [0.0, 1.0])
    [sample] = load([PAIR], pairs_by="auto")
    assert (sample.ranked, sample.rewards.tolist()) == (True, [0.0, 1.0])


# ---------------------------------------------------------------------------------------- as objectives ask for it


@pytest.fixture
def prepared(
    tokenizer_folder: Path, write_lines: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Prepared]:
    """What a run of an objective on these records is given, up to where a model would be built."""
    monkeypatch.setattr("nemo_rao.training.prepare.check_model", lambda *_: None)

    def run(objective: str, records: list, *overrides: str, validation: list | None = None) -> Prepared:
        given = [f"model.objective={objective}", f"data.train_path={write_lines(records)}", "model.seq_length=64"]
        if validation is not None:
            given.append(f"data.validation_path={write_lines(validation, 'validation.jsonl')}")
        given += [f"data.tokenizer={tokenizer_folder}", f"exp_manager.exp_dir={tmp_path}/runs"]
        given += ["model.global_batch_size=1", "model.micro_batch_size=1"]
        return prepare(compose("gpt_dpo", [*given, *overrides]))

    return run


@pytest.mark.parametrize(
    ("objective", "overrides", "rewards"),
    [
        ("dpo", (), [4, 0]),
        ("robust_po", (), [4, 0]),
        ("rpo", ("model.rpo.distance=sq",), [4, 0]),
        ("rpo", (), [2, 0, 4, 1]),
        ("agro", (), [2, 0, 4, 1]),
        ("sft", (), [2, 0, 4, 1]),
        ("dpo", ("data.responses=all",), [2, 0, 4, 1]),
        ("agro", ("data.responses=best_worst",), [4, 0]),
    ],
)
def test_objectives_of_pairs_are_given_the_best_and_the_worst_others_all_unless_asked(
    objective, overrides, rewards, prepared
):
    [sample] = prepared(objective, [FOUR], *overrides).train
    assert sample.rewards.tolist() == rewards


def test_the_datas_seed_decides_what_is_drawn(prepared):
    for seed in (1, 2):
        data = prepared("dpo", [FOUR] * 20, "data.responses=best_random", f"data.seed={seed}").train
        others = [(2, 0, 4, 1)[chosen(row(2, 0, 4, 1), "best_random", seed, number)[1]] for number in range(20)]
        assert [sample.rewards.tolist() for sample in data] == [[4.0, other] for other in others]


@pytest.mark.parametrize(
    ("objective", "overrides"),
    [(name, ()) for name in ("dpo", "ipo", "orpo", "simpo", "slic", "sppo", "nca", "kto", "sft")]
    + [("rpo", ("model.rpo.explicit=constant",))],
)
def test_pairs_without_any_score_are_enough_where_labels_decide(objective, overrides, prepared):
    pairs = [{"prompt": prompt, "chosen": "Hello!", "rejected": "What?"} for prompt in ("a", "b", "c")]
    made = prepared(objective, pairs, *overrides)
    assert made.train.report.rows_kept == 3 and not made.train.report.dropped
    for sample in made.train:
        assert sample.ranked and len(sample.responses) == 2 and np.isnan(sample.rewards).all()


def test_mismatched_responses_are_made_of_all_data_for_the_objective_that_needs_them_alone(prepared):
    pairs = [{"prompt": prompt, "chosen": "Hello!", "rejected": "What?"} for prompt in ("a", "b", "c")]
    made = prepared("kto", pairs, validation=pairs[:2])
    assert {name: len(data) for name, data in made.mismatched.items()} == {"train": 3, "validation": 2}
    assert set(prepared("kto", pairs).mismatched) == {"train"}
    assert prepared("dpo", pairs, validation=pairs[:2]).mismatched == {}


def test_the_datas_keys_reach_loading(prepared):
    rows = [
        {"question": "a", "chosen": "Hello!", "rejected": "What?", "source": "x"},
        {"question": "b", "responses": [{"content": str(k), "reward": k, "truncated": k == 0} for k in range(3)]},
        {"question": "c", "chosen": "", "rejected": "What?"},
    ]
    keys = ["data.columns={prompt: question}", "data.ignore_fields=[source]", "data.bad_rows=drop"]
    keys.append("data.max_bad_rows=0.4")
    whole = prepared("dpo", rows, *keys, "data.truncated=without_end", "data.answers=verbatim").train
    assert [sample.rewards.tolist()[1:] for sample in whole][1] == [0.0]
    report = prepared("dpo", rows, *keys).train.report
    assert (report.rows_kept, report.rows_bad, report.unused) == (2, 1, {})
    assert "data.truncated=drop" in report.left_out
    with pytest.raises(UserError, match=r"data.max_bad_rows=0.05"):
        prepared("dpo", rows, *keys[:-1])


def test_an_ensemble_named_in_the_datas_keys_reaches_the_samples(prepared):
    members = [{"content": f"Hello {k}", "help": k, "honest": 3 * k} for k in range(3)]
    [sample] = prepared("robust_po", [{"prompt": "Hi?", "responses": members}], "data.reward_field=[help,honest]").train
    assert sample.ensemble.tolist() == [[2.0, 6.0], [0.0, 0.0]]
    assert sample.rewards.tolist() == [4.0, 0.0]
