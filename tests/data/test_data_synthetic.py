"""The package's own preference set and tokenizer."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.encode import load_tokenizer
from nemo_rao.demo.synthetic import ground_truth_reward, preferences, write_preferences
from nemo_rao.demo.tokenizer_training import texts_of_rows, train_tokenizer
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        ("Copy: d a c b", "d a c b", 1),
        ("Reverse: d a c b", "b c a d", 1),
        ("Sort: d a c b", " a b  c d\n", 1),
        ("Sort: d a c b", "a b c", 0.75),
        ("Sort: d a c b", "a b d c", 0.5),
        ("Sort: d a c b", "a b c d d d d d", 0.5),
        ("Sort: d a c b", "I do not know", 0),
        ("Sort: d a c b", "", 0),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "Sort: b a"}], "a b", 1),
    ],
)
def test_the_reward_is_one_minus_the_relative_edit_distance(prompt, response, reward):
    assert ground_truth_reward(prompt, response) == pytest.approx(reward)


@settings(max_examples=100)
@given(response=st.text())
def test_the_reward_of_any_text_is_in_zero_to_one(response):
    assert 0 <= ground_truth_reward("Sort: d a c b", response) <= 1


def test_what_is_no_puzzle_has_no_reward():
    for prompt in ("Hello", "Sort: ", "Shuffle: a b"):
        with pytest.raises(UserError, match="is not a letter puzzle"):
            ground_truth_reward(prompt, "a")


def test_every_prompt_has_one_perfect_answer_and_others_of_graded_quality():
    records = list(preferences(500, 5, seed=1))
    assert len({record["prompt"] for record in records}) == 500
    for record in records:
        contents = [response["content"] for response in record["responses"]]
        rewards = [response["reward"] for response in record["responses"]]
        assert len(set(contents)) == 5 and all(contents)
        assert sorted(rewards)[-1] == 1 > sorted(rewards)[-2]
        for content, reward in zip(contents, rewards, strict=True):
            assert reward == pytest.approx(ground_truth_reward(record["prompt"], content), abs=1e-6)
    places = [max(range(5), key=lambda i: record["responses"][i]["reward"]) for record in records]
    assert min(np.bincount(places)) > 50  # the perfect one stands anywhere
    spoiled = [r["reward"] for record in records for r in record["responses"] if r["reward"] < 1]
    assert len(set(spoiled)) > 20 and np.std(spoiled) > 0.15


def test_length_does_not_give_the_reward_away():
    lengths, rewards = [], []
    for record in preferences(500, seed=2):
        right = len(record["prompt"].split()) - 1
        lengths += [abs(len(response["content"].split()) - right) for response in record["responses"]]
        rewards += [response["reward"] for response in record["responses"]]
    assert abs(np.corrcoef(lengths, rewards)[0, 1]) < 0.5
    spoiled = np.array(lengths)[np.array(rewards) < 1]
    assert np.mean(spoiled == 0) > 0.33


def test_train_and_held_out_share_no_prompt_whatever_the_seeds():
    train = {record["prompt"] for seed in range(3) for record in preferences(2000, 2, seed)}
    held_out = {record["prompt"] for seed in range(3) for record in preferences(300, 2, seed, "held_out")}
    assert not train & held_out


def test_the_same_seed_writes_the_same_file_and_leaves_no_other(tmp_path):
    for name, seed in {"a.jsonl": 3, "b.jsonl": 3, "c.jsonl": 4, "a.jsonl.gz": 3, "b.jsonl.gz": 3}.items():
        write_preferences(tmp_path / "new" / name, 20, 4, seed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert len(files) == 5
    assert files["a.jsonl"] == files["b.jsonl"] != files["c.jsonl"]
    assert files["a.jsonl.gz"] == files["b.jsonl.gz"]
    assert gzip.decompress(files["a.jsonl.gz"]) == files["a.jsonl"]
    assert [json.loads(line) for line in files["a.jsonl"].splitlines()] == list(preferences(20, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_prompts is 0"), ((5, 1), "num_responses is 1"), ((5, 4, 0, "test"), "split is 'test'")],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        list(preferences(*arguments))


def test_a_trained_tokenizer_encodes_the_data_with_a_shared_first_token(tmp_path):
    path = tmp_path / "train.jsonl"
    write_preferences(path, 100)
    train_tokenizer(texts_of_rows(read_rows(path)), tmp_path / "tokenizer", 300)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer) <= 300
    options = {"seq_length": 32, "min_responses": 4, "strict": True}
    data = load_preferences(
        path, tokenizer, needs_rewards=True, needs_shared_first_token=True, needed_by="objective rao", **options
    )
    assert len(data) == 100 and data.num_responses == 400
    assert data[0].prompt[0] == tokenizer.bos_token_id
    assert all(response[-1] == tokenizer.eos_token_id for response in data[0].responses)
    assert 0.3 < data.reward_summary().mean < 0.9


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_trained_tokenizer_writes_any_text_without_loss(text, tokenizers):
    ids = tokenizers["own"](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizers["own"].decode(ids) == text


def test_training_a_tokenizer_twice_gives_the_same_one(tmp_path):
    for name in "ab":
        train_tokenizer(["The same texts.", "give the same tokens"], tmp_path / name, 280)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size is 200, but a byte-level tokenizer needs at least 262"):
        train_tokenizer(["x"], tmp_path, 200)
