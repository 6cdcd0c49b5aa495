"""Rows from every published format and kind of file, and every way in which a file can be wrong."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rao.batch import Response, Row
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "What?"}
CANONICAL = {"prompt": "Hi?", "responses": [{"content": "Hello!", "reward": 1}, {"content": "What?", "reward": 0.25}]}


def contents(row: Row) -> list[tuple[str, float | None]]:
    return [(response.content, response.reward) for response in row.responses]


# ------------------------------------------------------------------------------------------------------- formats


def test_canonical_rows_keep_prompt_responses_and_place(write_lines):
    path = write_lines([CANONICAL, {"prompt": [SYSTEM, USER], "responses": [{"content": "Yes."}]}])
    first, second = read_rows(path)
    assert first == Row("Hi?", (Response("Hello!", 1.0), Response("What?", 0.25)), f"{path} line 1")
    assert second == Row((SYSTEM, USER), (Response("Yes.", None),), f"{path} line 2")


def test_ultrafeedback_is_read_as_published(write_lines):
    completion = {
        "annotations": {"helpfulness": {"Rating": "4", "Rationale": "..."}, "honesty": {"Rating": "N/A"}},
        "custom_system_prompt": "Be brief.",
        "model": "m",
        "response": "Hello!",
        "overall_score": 8.5,
        "fine-grained_score": 4.25,
    }
    record = {"source": "s", "instruction": "Hi?", "models": ["m"], "completions": [completion]}
    path = write_lines([record])
    (row,) = read_rows(path)
    assert (row.prompt, contents(row), row.ranked) == ("Hi?", [("Hello!", 8.5)], False)
    for field, reward in {
        "fine-grained_score": 4.25,
        "annotations.helpfulness.Rating": 4.0,
        "annotations.honesty.Rating": None,
    }.items():
        (row,) = read_rows(path, reward_field=field)
        assert contents(row) == [("Hello!", reward)]


def test_ultrafeedback_in_columns_is_turned_round(write_lines):
    columns = {"response": ["Hello!", "What?"], "overall_score": [8.5, 3.0], "model": ["a", "b"]}
    (row,) = read_rows(write_lines([{"instruction": "Hi?", "completions": columns}]))
    assert contents(row) == [("Hello!", 8.5), ("What?", 3.0)]


def test_nemo_aligner_pairs_are_ranked(write_lines):
    pair = {"prompt": "Hi?", "chosen_response": "Hello!", "rejected_response": "What?"}
    rewarded = pair | {"chosen_reward": 4, "rejected_reward": 1.5}
    first, second = read_rows(write_lines([rewarded, pair]))
    assert (first.prompt, contents(first), first.ranked) == ("Hi?", [("Hello!", 4.0), ("What?", 1.5)], True)
    assert contents(second) == [("Hello!", None), ("What?", None)]


SCORES = {"score_chosen": 1.0, "score_rejected": 2.0}  # against the ranking: chosen still stands first


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        pytest.param({"prompt": "Hi?", "chosen": "Hello!", "rejected": "What?"}, "Hi?", id="plain"),
        pytest.param({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, (SYSTEM, USER), id="messages"),
        pytest.param({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, "Hi?", id="text prompt, message answers"),
        pytest.param(
            {
                "prompt": "Hi?",
                "prompt_id": "1",
                "messages": [USER, GOOD],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
            },
            (USER,),
            id="ultrafeedback-binarized",
        ),
        pytest.param({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, (SYSTEM, USER), id="implicit"),
        pytest.param(
            {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, (USER, BAD, USER), id="multi-turn"
        ),
        pytest.param(
            {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            (SYSTEM, USER),
            id="prompt repeated in full",
        ),
        pytest.param(
            {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (SYSTEM, USER),
            id="prompt repeated without system",
        ),
        pytest.param(
            {"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (SYSTEM, USER), id="prompt goes on"
        ),
    ],
)
def test_chosen_and_rejected_share_the_prompt_and_stay_in_order(record, prompt, write_lines):
    (row,) = read_rows(write_lines([record | SCORES]))
    assert row.prompt == prompt
    assert contents(row) == [("Hello!", 1.0), ("What?", 2.0)]
    assert row.ranked


def test_identical_conversations_keep_their_last_message_as_the_answer(write_lines):
    (row,) = read_rows(write_lines([{"chosen": [USER, GOOD], "rejected": [USER, GOOD]}]))
    assert row.prompt == (USER,)
    assert contents(row) == [("Hello!", None)] * 2


def test_helpsteer_rows_with_the_same_prompt_are_one_row(write_lines):
    def record(prompt, response, helpfulness, verbosity):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity}

    path = write_lines([record("a", "x", 4, 0), record("a", "y", 2, 1), record("b", "z", 3, 2), record("a", "w", 1, 3)])
    rows = list(read_rows(path))
    assert [(row.prompt, contents(row)) for row in rows] == [
        ("a", [("x", 4.0), ("y", 2.0)]),
        ("b", [("z", 3.0)]),
        ("a", [("w", 1.0)]),
    ]
    assert [row.location for row in rows] == [f"{path} line {line}" for line in (1, 3, 4)]
    assert contents(next(iter(read_rows(path, reward_field="verbosity")))) == [("x", 0.0), ("y", 1.0)]


def test_helpsteer_rows_are_not_grouped_across_files(write_lines):
    record = {"prompt": "a", "response": "x", "helpfulness": 1}
    paths = [write_lines([record], "1.jsonl"), write_lines([record], "2.jsonl")]
    assert [len(row.responses) for row in read_rows(paths)] == [1, 1]


def test_completions_of_one_prompt_that_follow_each_other_are_one_row(write_lines):
    def record(prompt, completion, label):
        return {"prompt": prompt, "completion": completion, "label": label}

    path = write_lines(
        [record("a", "x", True), record("a", "y", False), record("b", "z", False), record("a", "w", True)]
    )
    rows = list(read_rows(path))
    assert [(row.prompt, contents(row)) for row in rows] == [
        ("a", [("x", 1.0), ("y", 0.0)]),
        ("b", [("z", 0.0)]),
        ("a", [("w", 1.0)]),
    ]
    assert [row.location for row in rows] == [f"{path} line {line}" for line in (1, 3, 4)]
    assert not any(row.ranked for row in rows)  # the order of completions is no preference


@pytest.mark.parametrize(
    ("fields", "reward"),
    [
        ({"label": True}, 1.0),
        ({"label": False}, 0.0),
        ({"label": 1}, 1.0),
        ({"label": 0}, 0.0),
        ({"reward": 0.25}, 0.25),
        ({"reward": 0.25, "label": True}, 0.25),  # the reward says more
        ({"reward": 0, "label": True}, 0.0),
        ({"reward": None, "label": True}, 1.0),
        ({"label": None}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("kind", ["unpaired", "canonical"])
def test_a_label_is_a_reward_of_1_or_0_where_there_is_no_reward(kind, fields, reward, write_lines):
    unpaired = {"prompt": "Hi?", "completion": "Hello!"} | fields
    canonical = {"prompt": "Hi?", "responses": [{"content": "Hello!"} | fields]}
    (row,) = read_rows(write_lines([unpaired if kind == "unpaired" else canonical]))
    assert (row.prompt, row.responses) == ("Hi?", (Response("Hello!", reward),))


def test_a_completion_is_text_or_one_assistant_message_whatever_the_prompt(write_lines):
    messages = [SYSTEM, USER]
    for prompt, completion in [("Hi?", "Hello!"), ("Hi?", [GOOD]), (messages, [GOOD]), (messages, "Hello!")]:
        (row,) = read_rows(write_lines([{"prompt": prompt, "completion": completion, "label": True}]))
        assert row.prompt == (prompt if isinstance(prompt, str) else tuple(prompt))
        assert contents(row) == [("Hello!", 1.0)]


def test_completions_of_one_conversation_are_one_row(write_lines):
    records = [{"prompt": [SYSTEM, USER], "completion": [entry], "label": entry is GOOD} for entry in (BAD, GOOD)]
    (row,) = read_rows(write_lines(records))
    assert contents(row) == [("What?", 0.0), ("Hello!", 1.0)]


def test_a_row_of_another_format_is_never_joined_to_a_completion_of_its_prompt(write_lines):
    completion = {"prompt": "Hi?", "completion": "Yes?", "label": True}
    rows = list(read_rows(write_lines([completion, CANONICAL, completion, PAIR])))
    assert [(len(row.responses), row.ranked) for row in rows] == [(1, False), (2, False), (1, False), (2, True)]


def test_a_chosen_reward_field_goes_before_label_and_reward_of_a_completion(write_lines):
    record = {"prompt": "Hi?", "completion": "Hello!", "label": True, "reward": 5, "scores": {"kind": 0.5}}
    (row,) = read_rows(write_lines([record]), reward_field="scores.kind")
    assert contents(row) == [("Hello!", 0.5)]


def test_reference_rewards_are_those_of_the_row_or_none(write_lines):
    given = [{"reference_rewards": [1, -0.5, 2.25]}, {"reference_rewards": []}, {"reference_rewards": None}, {}]
    rows = list(read_rows(write_lines([CANONICAL | fields for fields in given])))
    assert [row.reference_rewards for row in rows] == [(1.0, -0.5, 2.25), (), (), ()]
    assert all(contents(row) == [("Hello!", 1.0), ("What?", 0.25)] for row in rows)


# ----------------------------------------------------------------------------------------------------- ensembles


def test_several_reward_fields_are_an_ensemble_whose_mean_is_the_reward(write_lines):
    scored = [{"content": "x", "reward": 9, "a": 1, "b": {"c": 4}}, {"content": "y", "a": -2, "b": {"c": 0.5}}]
    (row,) = read_rows(write_lines([{"prompt": "Hi?", "responses": scored}]), reward_field=["a", "b.c"])
    assert [(response.reward, response.ensemble) for response in row.responses] == [
        (2.5, (1.0, 4.0)),
        (-0.75, (-2.0, 0.5)),
    ]
    (row,) = read_rows(write_lines([{"prompt": "Hi?", "responses": scored}]), reward_field=["b.c", "a"])
    assert row.responses[0].ensemble == (4.0, 1.0)


def test_ensembles_are_read_from_every_format_of_single_rewards(write_lines):
    scores = {"helpfulness": 4, "verbosity": 1}
    for record in (
        {"instruction": "Hi?", "completions": [{"response": "x"} | scores]},
        {"instruction": "Hi?", "completions": {"response": ["x"], "helpfulness": [4], "verbosity": [1]}},
        {"prompt": "Hi?", "response": "x"} | scores,
        {"prompt": "Hi?", "completion": "x", "label": False} | scores,
    ):
        (row,) = read_rows(write_lines([record]), reward_field=["helpfulness", "verbosity"])
        assert row.responses == (Response("x", 2.5, (4.0, 1.0)),)


def test_a_list_of_one_reward_field_is_an_ensemble_of_one_and_a_name_none(write_lines):
    path = write_lines([CANONICAL])
    for field, ensemble in ((["reward"], (1.0,)), ("reward", ()), (None, ())):
        (row,) = read_rows(path, reward_field=field)
        assert row.responses[0] == Response("Hello!", 1.0, ensemble)


# ---------------------------------------------------------------------------------------------------------- files


def test_every_kind_of_file_gives_the_same_rows(tmp_path, write_lines, monkeypatch):
    import datasets
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = [CANONICAL, {"prompt": "Bye?", "responses": [{"content": "Bye!", "reward": 0.5}]}]
    plain = write_lines(records)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "table.parquet")
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "hub").mkdir()
    Path(plain).rename(tmp_path / "hub" / "data.jsonl")
    expected = [(row.prompt, contents(row)) for row in read_rows(str(tmp_path / "hub" / "data.jsonl"))]
    assert len(expected) == 2

    for source, location in [
        (tmp_path / "packed.jsonl.gz", "packed.jsonl.gz line 2"),
        (tmp_path / "table.parquet", "table.parquet row 2"),
        (tmp_path / "saved", "saved row 2"),
        (tmp_path / "splits" / "train", "train row 2"),
        (f"hf:{tmp_path / 'hub'}", "hub row 2"),
        (f"hf:{tmp_path / 'hub'}:train", "hub:train row 2"),
    ]:
        rows = list(read_rows(source))
        assert [(row.prompt, contents(row)) for row in rows] == expected
        assert rows[1].location.endswith(location)

    with pytest.raises(UserError, match=r"splits: has several splits. Pass one of .*splits/train, .*splits/test"):
        list(read_rows(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"hub:nosuch: `datasets` cannot load it"):
        list(read_rows(f"hf:{tmp_path / 'hub'}:nosuch"))


def test_globs_and_lists_are_read_in_order(tmp_path, write_lines):
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        write_lines([CANONICAL | {"prompt": name}], name)
    assert [row.prompt for row in read_rows(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    listed = [str(tmp_path / "c.jsonl"), tmp_path / "[ab].jsonl"]
    assert [row.prompt for row in read_rows(listed)] == ["c.jsonl", "a.jsonl", "b.jsonl"]


def test_blank_lines_are_skipped_but_counted_and_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(CANONICAL).encode() + b"\n\n" + json.dumps(CANONICAL).encode())
    assert [row.location for row in read_rows(path)] == [f"{path} line 1", f"{path} line 3"]


def test_reading_json_lines_imports_nothing_heavy():
    check = "import sys, nemo_rao.rows.reading; sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])


# --------------------------------------------------------------------------------------------------------- errors


def fails(paths, **options) -> str:
    with pytest.raises(UserError) as caught:
        list(read_rows(paths, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("source", ["nosuch.jsonl", "nosuch-*.jsonl", "folder"])
def test_a_missing_source_is_named_at_once(source, tmp_path):
    if source == "folder":
        (tmp_path / source).mkdir()
    with pytest.raises(UserError, match=source.replace("*", r"\*")):
        list(read_rows(tmp_path / source)) if source == "folder" else read_rows(tmp_path / source)


def test_no_sources_and_unknown_suffixes_are_refused(tmp_path):
    assert "no data files given" in fails([])
    (tmp_path / "data.csv").write_text("a,b\n")
    assert "data.csv: unknown file type. Use one of .jsonl" in fails(tmp_path / "data.csv")
    assert "no data set is named" in fails("hf:")


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_gz_is_named(kept, tmp_path):
    lines = "".join(json.dumps(CANONICAL | {"prompt": f"{i} {hash(str(i))}"}) + "\n" for i in range(200))
    packed = gzip.compress(lines.encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(packed[: int(len(packed) * kept)])
    message = fails(path)
    assert "cut.jsonl.gz: truncated .gz" in message and "download it again" in message


def test_a_file_that_is_no_gz_or_no_parquet_is_named(tmp_path):
    for name, kind in {"plain.jsonl.gz": "damaged .gz", "plain.parquet": "cannot be read as Parquet"}.items():
        (tmp_path / name).write_text(json.dumps(CANONICAL))
        message = fails(tmp_path / name)
        assert name in message and kind in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "Hi?", ', "invalid JSON"),
        ("[1, 2]", "expected an object with named fields, found a list"),
        ('"text"', "expected an object"),
        ('{"prompt": "Hi?", "responses": [{"content": "\\ud800", "reward": 1}]}', "half a surrogate pair"),
        ("[" * 100_000, "cannot be read"),
        (
            '{"prompt": "Hi?", "question": "x"}',
            "with the fields prompt, question; accepted are canonical",
        ),
        ("{}", "unknown format with the fields none"),
    ],
)
def test_a_bad_line_is_named(line, complaint, write_lines):
    path = write_lines([CANONICAL, line])
    message = fails(path)
    assert message.startswith(f"{path} line 2: ") and complaint in message


def test_text_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "latin.jsonl line 1: not UTF-8 at byte 12" in fails(path)


def responses(*entries):
    return {"prompt": "Hi?", "responses": list(entries)}


PAIR = {"prompt": "Hi?", "chosen": "Hello!", "rejected": "What?"}
UNPAIRED = {"prompt": "Hi?", "completion": "Hello!"}


@pytest.mark.parametrize(
    ("record", "field", "complaint"),
    [
        ({"responses": [{"content": "x"}]}, "prompt", "is missing"),
        ({"prompt": "Hi?", "responses": None}, "responses", "is null"),
        (responses({"reward": 1}), "responses[0].content", "is missing"),
        (responses({"content": "x"}, {"content": None}), "responses[1].content", "is null"),
        ({"completions": [{"response": "x"}]}, "instruction", "is missing"),
        ({"instruction": "Hi?", "completions": [{"overall_score": 1}]}, "completions[0].response", "is missing"),
        ({"prompt": "Hi?", "chosen_response": "x"}, "rejected_response", "is missing"),
        ({"prompt": "Hi?", "rejected": "x"}, "chosen", "is missing"),
        ({"chosen": "x", "rejected": "y"}, "prompt", "is missing"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "prompt", "is missing"),
        ({"response": "x", "helpfulness": 1}, "prompt", "is missing"),
        # wrong types
        (responses("x"), "responses[0]", "must be an object, found text ('x')"),
        ({"prompt": "Hi?", "responses": "x"}, "responses", "must be a list"),
        (
            {"prompt": 3, "responses": [{"content": "x"}]},
            "prompt",
            "must be text or a list of messages, found",
        ),
        ({"prompt": ["Hi?"], "responses": [{"content": "x"}]}, "prompt[0]", "must be a message"),
        ({"prompt": [{"role": "user"}], "responses": [{"content": "x"}]}, "prompt[0].content", "is missing"),
        ({"prompt": [USER | {"content": ["x"]}], "responses": [{"content": "x"}]}, "prompt[0].content", "must be text"),
        (responses({"content": 3}), "responses[0].content", "must be text, found a number (3)"),
        (PAIR | {"chosen": [GOOD]}, "chosen", "both as text or both as messages"),
        (PAIR | {"chosen": 1, "rejected": 2}, "chosen", "must be text or a list of messages"),
        ({"prompt": "Hi?", "response": 7}, "response", "must be text"),
        # empty
        (responses({"content": ""}), "responses[0].content", "is empty"),
        (responses({"content": " \n\t"}), "responses[0].content", "is empty"),
        (responses(), "responses", "is empty"),
        ({"prompt": " ", "responses": [{"content": "x"}]}, "prompt", "is empty"),
        ({"prompt": [], "responses": [{"content": "x"}]}, "prompt", "is empty"),
        ({"prompt": [USER | {"content": ""}], "responses": [{"content": "x"}]}, "prompt[0].content", "is empty"),
        ({"instruction": "", "completions": [{"response": "x"}]}, "instruction", "is empty"),
        (PAIR | {"rejected": "  "}, "rejected", "is empty"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": ""}]}, "rejected", "is empty"),
        ({"prompt": "Hi?", "chosen_response": "x", "rejected_response": ""}, "rejected_response", "is empty"),
        # conversations
        ({"prompt": [USER, GOOD], "responses": [{"content": "x"}]}, "prompt", "ends with an assistant message"),
        ({"chosen": [USER, GOOD, GOOD], "rejected": [USER, GOOD, BAD]}, "prompt", "ends with an assistant message"),
        ({"chosen": [USER | {"content": ""}, GOOD], "rejected": [USER | {"content": ""}, BAD]}, "content", "is empty"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen", "one assistant message"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "chosen", "one assistant message"),
        (
            {"prompt": "Hi?", "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
            "prompt",
            "is missing from the messages",
        ),
        # rewards
        (responses({"content": "x", "reward": float("nan")}), "responses[0].reward", "must be a finite number"),
        (responses({"content": "x", "reward": float("inf")}), "responses[0].reward", "must be a finite number"),
        (
            responses({"content": "x", "reward": -1e39}),
            "responses[0].reward",
            "squared errors and gradients above 1e+12",
        ),
        (responses({"content": "x", "reward": 1.1e12}), "responses[0].reward", "nemo-rao score --standardize global"),
        (PAIR | {"score_rejected": 1e30}, "score_rejected", "is 1e+30, but squared errors and gradients above"),
        (responses({"content": "x", "reward": 10**400}), "responses[0].reward", "must be a finite number"),
        (responses({"content": "x", "reward": "1"}), "responses[0].reward", "must be a number, found text ('1')"),
        (responses({"content": "x", "reward": True}), "responses[0].reward", "must be a number, found a boolean"),
        ({"instruction": "a", "completions": [{"response": "x", "overall_score": []}]}, "overall_score", "be a number"),
        (
            {"prompt": "Hi?", "chosen_response": "x", "rejected_response": "y", "chosen_reward": False},
            "chosen_reward",
            "must be a number, found a boolean",
        ),
        ({"prompt": "Hi?", "response": "x", "helpfulness": "high"}, "helpfulness", "must be a number"),
        ({"instruction": "a", "completions": {"response": ["x"], "overall_score": []}}, "completions", "lengths"),
        # labels
        (
            responses({"content": "x", "label": "yes"}),
            "responses[0].label",
            "must be true or false, found text ('yes')",
        ),
        (responses({"content": "x", "label": 2}), "responses[0].label", "must be true or false, found a number (2)"),
        (UNPAIRED | {"label": "true"}, "label", "must be true or false, found text ('true')"),
        (UNPAIRED | {"label": 0.5}, "label", "must be true or false, found a number (0.5)"),
        (UNPAIRED | {"label": 1.0}, "label", "must be true or false, found a number (1.0)"),
        (UNPAIRED | {"label": [True]}, "label", "must be true or false, found a list"),
        (UNPAIRED | {"reward": True}, "reward", "must be a number, found a boolean (True)"),
        # completions
        ({"completion": "x", "label": True}, "prompt", "is missing"),
        (UNPAIRED | {"completion": None}, "completion", "must be text or a list of messages, found null"),
        (UNPAIRED | {"completion": 7}, "completion", "must be text or a list of messages, found a number (7)"),
        (UNPAIRED | {"completion": " "}, "completion", "is empty"),
        (UNPAIRED | {"completion": []}, "completion", "is empty"),
        (UNPAIRED | {"completion": [GOOD | {"content": ""}]}, "completion", "is empty"),
        (UNPAIRED | {"completion": [GOOD, BAD]}, "completion", "one assistant message, found messages of assistant, a"),
        (
            UNPAIRED | {"completion": [USER, GOOD]},
            "completion",
            "one assistant message, found messages of user, assist",
        ),
        (UNPAIRED | {"completion": [USER]}, "completion", "must be one assistant message, found messages of user"),
        # reference rewards
        (CANONICAL | {"reference_rewards": 1.5}, "reference_rewards", "must be a list of numbers, found a number"),
        (
            CANONICAL | {"reference_rewards": {"a": 1}},
            "reference_rewards",
            "must be a list of numbers, found an object",
        ),
        (CANONICAL | {"reference_rewards": "1, 2"}, "reference_rewards", "must be a list of numbers, found text"),
        (CANONICAL | {"reference_rewards": [1, "2"]}, "reference_rewards[1]", "must be a number, found text ('2')"),
        (CANONICAL | {"reference_rewards": [True]}, "reference_rewards[0]", "must be a number, found a boolean"),
        (CANONICAL | {"reference_rewards": [[1]]}, "reference_rewards[0]", "must be a number, found a list"),
        (CANONICAL | {"reference_rewards": [0, float("nan")]}, "reference_rewards[1]", "must be a finite number"),
        (CANONICAL | {"reference_rewards": [0, None]}, "reference_rewards[1]", "is null. Drop it, or leave"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(record, field, complaint, write_lines):
    path = write_lines([CANONICAL, record])
    message = fails(path)
    assert message.startswith(f"{path} line 2: ")
    assert f"{field}'" in message and complaint in message


def test_a_chosen_reward_field_must_be_there_and_lead_somewhere(write_lines):
    path = write_lines([responses({"content": "x", "reward": 1, "scores": {"a": 2}})])
    assert next(iter(read_rows(path, reward_field="scores.a"))).responses[0].reward == 2.0
    assert "line 1: field 'responses[0].quality' is missing" in fails(path, reward_field="quality")
    assert "line 1: field 'responses[0].scores.b' is missing" in fails(path, reward_field="scores.b")
    assert "reward field 'reward.a' leads into a number (1)" in fails(path, reward_field="reward.a")
    assert "line 1: reward field 'x' cannot be used for pairs" in fails(
        write_lines([PAIR], "2.jsonl"), reward_field="x"
    )


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (responses({"content": "x", "a": 1, "b": 2}, {"content": "y", "a": 1}), "field 'responses[1].b' is missing"),
        (responses({"content": "x", "a": 1, "b": "2"}), "field 'responses[0].b' must be a number, found text ('2')"),
        (UNPAIRED | {"a": 1, "label": True}, "field 'b' is missing (fields found: prompt, completion, a, label)"),
        (PAIR | {"a": 1, "b": 2}, "reward field 'a', 'b' cannot be used for pairs, whose rewards are score_chosen"),
        (
            {"prompt": "Hi?", "chosen_response": "x", "rejected_response": "y", "a": 1, "b": 2},
            "reward field 'a', 'b' cannot be used for pairs, whose rewards are chosen_reward and rejected_reward",
        ),
    ],
)
def test_every_member_of_an_ensemble_must_be_there_in_every_response(record, complaint, write_lines):
    path = write_lines([responses({"content": "x", "a": 1, "b": 2}), record])
    assert fails(path, reward_field=["a", "b"]).startswith(f"{path} line 2: {complaint}")


@pytest.mark.parametrize("nothing", [[], "", ["reward", ""]])
def test_a_reward_field_without_a_name_is_refused_before_any_file_is_read(nothing, write_lines):
    with pytest.raises(UserError, match=r"data\.reward_field=.* names no field"):
        read_rows(write_lines([CANONICAL]), reward_field=nothing)


# ------------------------------------------------------------------------------------------------------------ chats


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye?"},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "Wait"},
]


def test_a_chat_is_a_prompt_with_its_first_answer_and_what_follows_up_to_the_last(write_lines):
    (row,) = read_rows(write_lines([{"prompt": "Hi?", "prompt_id": "7", "messages": TURNS}]))
    assert row.prompt == tuple(TURNS[:2])
    assert row.responses == (Response("Hello.", continuation=tuple(TURNS[3:5])),)
    (row,) = read_rows(write_lines([{"messages": TURNS[:3]}]))
    assert row.responses == (Response("Hello."),)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (TURNS[:2], "must contain an assistant message"),
        (TURNS[2:4], "must contain an assistant message after another message"),
        ([*TURNS[:3], TURNS[3], {"role": "assistant", "content": " "}], r"messages\[4\].content' is empty"),
    ],
)
def test_a_chat_without_an_answer_is_refused(write_lines, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        list(read_rows(write_lines([{"messages": messages}])))
