"""Prompts under any name, the columns that belong to them, and fields that are renamed, ignored or not read."""

import json

import pytest

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "What?"}
SIDES = {"chosen": "The answer is 7.", "rejected": "The answer is 9."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}}]


@pytest.fixture
def read(write_lines):
    def of(*records, **options) -> Row:
        (row,) = read_rows(write_lines(records), **options)
        return row

    return of


@pytest.fixture
def refusal(write_lines):
    def of(*records, **options) -> str:
        with pytest.raises(UserError) as caught:
            list(read_rows(write_lines(records), **options))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return of


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"question": "Hi?"}, "Hi?"),
        ({"query": "Hi?", "prompt": None}, "Hi?"),
        ({"input": "Hi?"}, "Hi?"),
        ({"instruction": "Add.", "input": "2 and 5"}, "Add.\n2 and 5"),
        ({"instruction": "Hi?", "input": ""}, "Hi?"),
        ({"system": "Be kind.", "question": "Hi?"}, (SYSTEM, USER)),
        ({"system_prompt": "Be kind.", "prompt": [USER]}, (SYSTEM, USER)),
        ({"system": "", "question": "Hi?"}, "Hi?"),
        ({"system": "Be kind.", "prompt": [SYSTEM, USER]}, (SYSTEM, USER)),  # said already
        ({"prompt": "Hi?", "question": " Hi?\n"}, "Hi?"),
        (
            {"system": "Be kind.", "history": [["a", "b"]], "prompt": "Hi?"},
            (SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER),
        ),
        ({"prompt": [SYSTEM, USER], "history": [["a", "b"]]}, (SYSTEM, {"role": "user", "content": "a"}, ..., USER)),
        ({"conversations": [{"from": "human", "value": "Hi?"}]}, (USER,)),
    ],
)
@pytest.mark.parametrize(
    "answers", [SIDES, {"chosen": [GOOD], "rejected": [BAD]}, {"response": "7"}, {"completion": "7"}]
)
def test_a_prompt_is_read_under_each_of_its_names_with_system_message_and_history(columns, prompt, answers, read):
    row = read(columns | answers)
    found = row.prompt
    if isinstance(prompt, tuple) and ... in prompt:
        found = tuple(... if expected is ... else message for message, expected in zip(found, prompt, strict=True))
    assert (found, row.unused) == (prompt, ())


def test_what_two_answers_share_is_no_prompt(read, refusal):
    for one, other in [("The answer is 7.", "The answer is 9."), ("Sure, a", "Sure, b"), ("<think>\na", "<think>\nb")]:
        said = refusal({"chosen": one, "rejected": other, "text": "Name a prime."})
        assert "field 'prompt' is missing (fields found: chosen, rejected, text)" in said
        assert "data.columns.prompt=NAME" in said
        row = read({"chosen": one, "rejected": other, "text": "Name a prime."}, columns={"prompt": "text"})
        assert (row.prompt, [response.content for response in row.responses]) == ("Name a prime.", [one, other])


@pytest.mark.parametrize(
    "columns",
    [
        {"context": "of two"},
        {"Question": "Which?"},
        {"question": "Which?"},
        {"functions": [{"name": "add"}]},
        {"messages": [USER, {"role": "assistant", "content": "Another answer."}]},
        {"input": "2 and 5"},
    ],
)
def test_a_column_that_looks_like_part_of_the_prompt_is_used_or_refused(columns, read, refusal):
    (name,) = columns
    said = refusal({"prompt": "Hi?"} | columns | SIDES)
    assert f"field '{name}' looks like part of the prompt" in said and f"data.ignore_fields=[{name}]" in said
    assert read({"prompt": "Hi?"} | columns | SIDES, ignore_fields=[name]) == read({"prompt": "Hi?"} | SIDES)


def test_a_system_message_or_a_prompt_that_differs_from_the_messages_is_refused(refusal):
    said = refusal({"system": "Be brief.", "prompt": [SYSTEM, USER]} | SIDES)
    assert "field 'system' differs from the system message of the prompt" in said
    said = refusal({"question": "Which?", "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert "field 'question' is text that is missing from the messages" in said


def test_columns_without_content_or_said_by_the_row_already_are_no_remark(read):
    messages = [SYSTEM, USER, GOOD]
    row = read(
        {"prompt": "Hi?", "messages": messages, "chosen": messages, "rejected": [SYSTEM, USER, BAD], "tools": []}
    )
    assert (row.prompt, row.template_fields, row.unused) == ((SYSTEM, USER), {}, ())


# --------------------------------------------------------------------------------------------- the template's columns


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])], repr(TOOLS)])
def test_tools_and_documents_are_kept_for_the_template_also_as_json_text(tools, read):
    row = read(
        {"prompt": "Hi?", "tools": tools, "documents": [{"text": "a"}], "chat_template_kwargs": {"x": 1}} | SIDES
    )
    assert row.template_fields == {"tools": TOOLS, "documents": [{"text": "a"}], "x": 1}


def test_tools_are_kept_without_the_nulls_of_a_column_store(tmp_path):
    import pyarrow
    import pyarrow.parquet

    calls = [{"function": {"name": "add", "arguments": {"a": 2}}}]
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    other = [{"type": "function", "function": {"name": "sub", "parameters": {"properties": {"b": {"type": "text"}}}}}]
    records = [{"messages": messages, "tools": TOOLS}, {"messages": [USER, GOOD], "tools": other}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "tools.parquet")
    first, second = read_rows(tmp_path / "tools.parquet")
    assert (first.template_fields, second.template_fields) == ({"tools": TOOLS}, {"tools": other})
    assert (first.responses[0].fields, second.responses[0].fields) == ({"tool_calls": calls}, {})
    assert first.unused == ()


def test_tools_of_other_shapes_are_refused(refusal):
    assert "field 'tools' must be a list of objects" in refusal({"prompt": "Hi?", "tools": {"a": 1}} | SIDES)
    assert "field 'tools' must be an object or a list" in refusal({"prompt": "Hi?", "tools": "[add]"} | SIDES)


def test_rows_of_one_response_are_joined_only_where_their_tools_are_the_same(write_lines):
    records = [
        {"prompt": "Hi?", "response": text, "tools": tools} for text, tools in [("a", TOOLS), ("b", TOOLS), ("c", [])]
    ]
    assert [len(row.responses) for row in read_rows(write_lines(records))] == [2, 1]


# ------------------------------------------------------------------------------------------- what is not read, and keys


def test_what_nothing_reads_is_named_by_its_path(read, write_lines):
    completion = {"response": "x", "model": "m", "overall_score": 1, "annotations": {"a": {"Rating": "4"}, "b": 2}}
    record = {"instruction": "Hi?", "source": "s", "nothing": None, "completions": [completion, completion]}
    unused = ("source", "completions[].model", "completions[].annotations")
    assert read(record).unused == unused
    assert read(record, ignore_fields=["source", "completions[].model"]).unused == unused[2:]
    used = read(record, reward_field="annotations.a.Rating")
    assert used.unused == ("source", *(f"completions[].{name}" for name in ("model", "overall_score", "annotations.b")))
    rows = read_rows(write_lines([{"prompt": "Hi?", "response": "x", name: 1} for name in "ab"]))
    assert [row.unused for row in rows] == [("a", "b")]  # one row of two records
    chat = read({"messages": [USER | {"content": [{"type": "text", "text": "Hi?", "cache": 1}]}, GOOD, USER], "id": 1})
    assert chat.unused == ("id", "messages[].content[].cache", "messages[] after the last answer")


def test_columns_name_any_fields_of_the_file(read, refusal):
    record = {"q": "Hi?", "good": "Hello!", "bad": "What?", "s": 2.0}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": "s"}
    row = read(record, columns=names)
    assert (row.prompt, [r.content for r in row.responses], row.unused) == ("Hi?", ["Hello!", "What?"], ())
    assert row.responses[0].reward == 2.0
    assert read({"prompt": "a", "q": "Hi?"} | SIDES, columns={"prompt": "q"}, ignore_fields=["prompt"]).prompt == "Hi?"
    swapped = read(
        {"chosen": "b", "rejected": "a", "prompt": "Hi?"}, columns={"chosen": "rejected", "rejected": "chosen"}
    )
    assert [response.content for response in swapped.responses] == ["a", "b"]
    row = read({"prompt": "Hi?", "response": "x", "score": 3}, columns={"quality": "score"}, reward_field="quality")
    assert row.responses[0].reward == 3.0

    said = refusal(record, columns=names | {"system": "nosuch"})
    assert "field 'nosuch', which data.columns names for 'system', is missing (fields found: q, good, bad, s)" in said
    said = refusal({"prompt": "a", "q": "Hi?"} | SIDES, columns={"prompt": "q"})
    assert "a field 'prompt' besides 'q'" in said and "Add prompt to data.ignore_fields" in said


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"columns": {"promt": "q"}}, "data.columns.promt: no data format reads this field; did you mean prompt?"),
        ({"columns": {"prompt": ""}}, "data.columns.prompt is ''"),
        ({"ignore_fields": [""]}, "data.ignore_fields="),
    ],
)
def test_keys_that_name_nothing_are_refused_before_any_file_is_read(options, complaint, write_lines):
    with pytest.raises(UserError) as caught:
        read_rows(write_lines([{}]), **options)
    assert complaint in str(caught.value)


def test_a_bad_record_is_handed_over_and_skipped(write_lines):
    good = {"prompt": "Hi?", "completion": "x"}
    bad: list[UserError] = []
    lines = [good, "{broken", good | {"completion": ""}, good, {"prompt": "Hi?"}, [1], good | {"context": "c"}]
    path = write_lines(lines)
    (row,) = read_rows(path, on_bad=bad.append)
    assert len(row.responses) == 2
    causes = ["invalid JSON", "'completion' is empty", "unknown format", "expected an object", "'context' looks like"]
    for error, line, cause in zip(bad, (2, 3, 5, 6, 7), causes, strict=True):
        assert str(error).startswith(f"{path} line {line}: ") and cause in str(error)


def test_a_mark_that_is_null_is_no_mark_where_another_is_there(read):
    nulls = dict.fromkeys(("responses", "chosen", "rejected"))
    assert read(nulls | {"messages": [USER, GOOD], "tools": None}).responses[0].content == "Hello!"
