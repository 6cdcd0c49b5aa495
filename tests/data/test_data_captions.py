"""The captions that the toy studies are made of, and their judge."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rao.data.encode import load_tokenizer
from nemo_rao.demo.captions import ARTICLES, LINKS, MOODS, TOPICS, make_data, parse, preferences, quality
from nemo_rao.errors import UserError

PROMPT = "Write 4 words, calm, about the sea: gull, wave. Not salt."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("the quiet gull wave", 0.25 + 0.2 + 0.2 + 0.15 + 0.1 + 0.1 * 3 / 4),
        ("the quiet gull and wave", 0.25 + 0.2 + 0.2 + 0.15 * 3 / 4 + 0.1 + 0.1),
        ("soft gull and wave", 1),
        ("grim gull and hay", 0.25 / 2 + 0.2 / 2 + 0 + 0.15 + 0.1 + 0.1),
        ("gull gull salt dog", 0.7 * (0.25 / 2 + 0.2 + 0 + 0.15 + 0.1 * 2 / 3 + 0)),
        ("a b c d e f g h i", 0),
        ("", 0),
    ],
)
def test_quality_is_the_weighted_mean_of_its_shares(response, expected):
    assert quality(PROMPT, response) == pytest.approx(expected)
    assert quality(
        [{"role": "system", "content": "s"}, {"role": "user", "content": PROMPT}], response
    ) == pytest.approx(expected)


@given(response=st.text() | st.lists(st.sampled_from(["salt", "gull", "soft", "the", "and"])).map(" ".join))
def test_quality_of_any_text_is_in_zero_to_one(response):
    assert 0 <= quality(PROMPT, response) <= 1


@pytest.mark.parametrize(
    "prompt", ["Sort: a b", PROMPT + " Please", PROMPT.replace("sea", "see"), "Write 0" + PROMPT[7:]]
)
def test_what_is_no_request_has_no_quality(prompt):
    with pytest.raises(UserError, match="is not a request for a caption"):
        quality(prompt, "a")


def test_a_word_has_one_meaning():
    words = [word for of_kind in (*TOPICS.values(), *MOODS.values(), ARTICLES, LINKS) for word in of_kind]
    assert len(words) == len({*words})


def test_captions_are_varied_and_of_graded_quality():
    records = list(preferences(400, 8))
    assert len({record["prompt"] for record in records}) == 400
    rewards = np.array([[response["reward"] for response in record["responses"]] for record in records])
    for record in records:
        contents = [response["content"] for response in record["responses"]]
        assert len({*contents}) == 8 and all(contents)
        assert record["responses"][0]["reward"] == pytest.approx(quality(record["prompt"], contents[0]), abs=1e-6)
    assert rewards.mean() == pytest.approx(0.71, abs=0.02) and rewards.std() == pytest.approx(0.18, abs=0.02)
    assert rewards.max(axis=1).mean() > rewards.mean() + 0.2, "the best of eight is much better than one"
    ties = np.mean(rewards[:, :-1] == rewards[:, 1:])
    assert ties < 0.02, "two captions are seldom of equal quality"


def test_equal_arguments_give_equal_records_and_no_prompt_is_in_both_splits():
    assert list(preferences(50, 2, seed=3)) == list(preferences(50, 2, seed=3)) != list(preferences(50, 2, seed=4))
    prompts = {split: {row["prompt"] for row in preferences(1500, 1, split=split)} for split in ("train", "held_out")}
    assert not prompts["train"] & prompts["held_out"]
    assert str(parse(next(iter(prompts["train"])))) in prompts["train"]


def test_noise_changes_rewards_alone():
    clean, noisy = list(preferences(300, 4)), list(preferences(300, 4, noise=0.3))
    errors = []
    for one, other in zip(clean, noisy, strict=True):
        assert one["prompt"] == other["prompt"]
        for a, b in zip(one["responses"], other["responses"], strict=True):
            assert a["content"] == b["content"]
            errors.append(b["reward"] - a["reward"])
    assert statistics.mean(errors) == pytest.approx(0, abs=0.03)
    assert statistics.stdev(errors) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_prompts": 0, "num_responses": 2}, "num_prompts is 0"),
        ({"num_prompts": 1, "num_responses": 17}, "num_responses is 17"),
        ({"num_prompts": 20_001, "num_responses": 2, "split": "held_out"}, "num_prompts is 20001"),
        ({"num_prompts": 1, "num_responses": 2, "split": "test"}, "split is 'test'"),
        ({"num_prompts": 1, "num_responses": 2, "noise": -1}, "noise is -1"),
    ],
)
def test_arguments_outside_their_ranges_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        list(preferences(**arguments))


def test_data_of_studies_has_a_token_for_each_word(tmp_path):
    make_data(tmp_path, num_prompts=800, num_responses=2, num_examples=30, num_held_out=20)
    rows = {
        name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in (
            *("train.jsonl", "train_noisy.jsonl", "examples.jsonl", "unrelated.jsonl"),
            *("held_out.jsonl", "selection.jsonl"),
        )
    }
    assert [len(of_file) for of_file in rows.values()] == [800, 800, 30, 30, 20, 20]
    examples, unrelated = (
        [(row["prompt"], row["responses"][0]["content"]) for row in rows[name]]
        for name in ("examples.jsonl", "unrelated.jsonl")
    )
    assert not {*examples} & {*unrelated}
    for column in (0, 1):
        assert sorted(pair[column] for pair in examples) == sorted(pair[column] for pair in unrelated)
    assert {row["prompt"] for row in rows["train.jsonl"]} == {row["prompt"] for row in rows["train_noisy.jsonl"]}
    held_out = {row["prompt"] for row in rows["held_out.jsonl"]}
    others = ("train.jsonl", "examples.jsonl", "selection.jsonl")
    assert not held_out & {row["prompt"] for name in others for row in rows[name]}
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    for word in (word for nouns in TOPICS.values() for word in nouns):
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
