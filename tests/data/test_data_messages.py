"""Messages in the shapes in which they are published: what is kept for the template, and what is refused."""

import json

import pytest

from nemo_rao.batch import Response
from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "What?"}
CALLS = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]


@pytest.fixture
def read(write_lines):
    def of(record):
        (row,) = read_rows(write_lines([record]))
        return row

    return of


def test_fields_of_an_answers_message_are_kept_for_the_template(read):
    thought = {"reasoning_content": "two and two", "tool_calls": CALLS, "name": "a", "other": [1]}
    for record in (
        {"prompt": [USER], "chosen": [GOOD | thought], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD | thought, "rejected": BAD},
        {"chosen": [USER, GOOD | thought], "rejected": [USER, BAD]},
        {"messages": [USER, GOOD | thought, USER, GOOD | thought]},
        {"prompt": [USER], "completion": [GOOD | thought]},
    ):
        row = read(record)
        assert (row.responses[0].content, row.responses[0].fields, row.unused) == ("Hello!", thought, ())
        if row.responses[0].continuation:
            assert row.responses[0].continuation == (USER, GOOD | thought)
    row = read({"prompt": "Hi?", "responses": [{"content": "x", "reasoning_content": "y", "tool_calls": CALLS}]})
    assert row.responses == (Response("x", fields={"reasoning_content": "y", "tool_calls": CALLS}),)


def test_fields_that_say_nothing_are_left_out(read):
    nothing = {"reasoning_content": "", "tool_calls": [], "function_call": None, "annotations": {}, "refusal": None}
    assert read({"messages": [USER | nothing, GOOD | nothing]}) == read({"messages": [USER, GOOD]})


@pytest.mark.parametrize("calls", [CALLS, json.dumps(CALLS)])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_content_may_be_missing_beside_tool_calls(content, calls, read):
    called = {"role": "assistant", "tool_calls": calls} | content
    result = {"role": "tool", "tool_call_id": "1", "content": "4"}
    row = read({"messages": [USER, called, result, GOOD]})
    assert row.responses == (Response("", continuation=(result, GOOD), fields={"tool_calls": CALLS}),)
    row = read({"prompt": [USER, called, result], "chosen": [GOOD], "rejected": [called]})
    assert row.prompt[1] == {"role": "assistant", "content": "", "tool_calls": CALLS}
    assert row.responses[1] == Response("", fields={"tool_calls": CALLS})


def test_a_weight_of_0_marks_an_answer_that_is_not_learned(read, write_lines):
    row = read({"messages": [USER, BAD | {"weight": 0}, USER | {"weight": 1}, GOOD | {"weight": 1}]})
    assert row.responses == (Response("What?", continuation=(USER, GOOD | {"weight": 1.0}), weight=0.0),)
    row = read({"prompt": [USER, BAD | {"weight": 0}, USER], "chosen": [GOOD], "rejected": [BAD | {"weight": 0}]})
    assert row.prompt == (USER, BAD, USER)  # a prompt is not learned
    assert [response.weight for response in row.responses] == [1.0, 0.0]
    for weight in (0.5, 2, "1", [1]):
        with pytest.raises(UserError, match=r"field 'messages\[1\].weight' must be 0 or 1"):
            list(read_rows(write_lines([{"messages": [USER, GOOD | {"weight": weight}]}])))


def test_cut_responses_are_known(read, write_lines):
    row = read(
        {"prompt": "Hi?", "responses": [{"content": "x", "truncated": True}, {"content": "y", "truncated": False}]}
    )
    assert [response.truncated for response in row.responses] == [True, False]
    row = read({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"truncated": True}]})
    assert row.responses[1] == Response("What?", truncated=True)
    with pytest.raises(UserError, match=r"'responses\[0\].truncated' must be true or false"):
        list(read_rows(write_lines([{"prompt": "Hi?", "responses": [{"content": "x", "truncated": "length"}]}])))


def test_parts_of_text_are_joined_and_others_refused(read, write_lines):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    assert read({"messages": [USER, GOOD | {"content": parts}]}).responses[0].content == "Hello!"
    for part in ({"type": "image_url", "image_url": "x"}, {"type": "text"}, "text"):
        with pytest.raises(UserError, match=r"field 'messages\[1\].content' must be text, or a list of text parts"):
            list(read_rows(write_lines([{"messages": [USER, GOOD | {"content": [*parts, part]}]}])))


@pytest.mark.parametrize("as_text", [json.dumps, repr, lambda messages: "\n " + json.dumps(messages, indent=1)])
def test_messages_that_stand_in_a_text_are_read_as_messages(as_text, read):
    expected = read({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    for record in (
        {"prompt": as_text([USER]), "chosen": as_text([GOOD]), "rejected": as_text([BAD])},
        {"prompt": as_text([USER]), "chosen": "Hello!", "rejected": "What?"},
        {"chosen": as_text([USER, GOOD]), "rejected": as_text([USER, BAD])},
    ):
        assert read(record) == expected
    assert read({"messages": as_text([USER, GOOD])}) == read({"messages": [USER, GOOD]})
    assert read({"prompt": "Hi?", "completion": as_text([GOOD])}) == read({"prompt": "Hi?", "completion": "Hello!"})


def test_a_text_about_messages_is_a_text_and_messages_that_cannot_be_read_are_refused(read, write_lines):
    for text in ('[{"a": 1}]', "[1, 2]", "What is [{'role': 'user'}]?"):
        assert read({"prompt": text, "chosen": "a", "rejected": "b"}).prompt == text
    printed = "[{'content': 'Hi?', 'role': 'user'}\n {'content': 'Hello!', 'role': 'assistant'}]"  # by numpy
    with pytest.raises(UserError, match="field 'prompt' is text that begins like a list of messages, but is not JSON"):
        list(read_rows(write_lines([{"prompt": printed, "chosen": "a", "rejected": "b"}])))


# --------------------------------------------------------------------------------------------------------- ShareGPT


def test_sharegpt_conversations_are_chats(read):
    turns = [
        {"from": "human", "value": "Hi?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Hello!", "weight": 0},
    ]
    row = read({"conversations": turns, "system": "Be kind.", "tools": json.dumps(CALLS)})
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    assert row.prompt == ({"role": "system", "content": "Be kind."}, USER)
    after = ({"role": "tool", "content": "4"}, GOOD | {"weight": 0.0})
    assert row.responses == (Response("", continuation=after, fields={"tool_calls": [call]}),)
    assert row.template_fields == {"tools": CALLS}
    assert read({"conversation": [USER, GOOD]}) == read({"messages": [USER, GOOD]})


def test_llama_factorys_pairs_answer_the_conversation(read):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "Hi?"}]
    good, bad = {"from": "gpt", "value": "Hello!"}, {"from": "gpt", "value": "What?"}
    row = read({"conversations": turns, "chosen": good, "rejected": bad})
    assert row.prompt == ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER)
    assert [response.content for response in row.responses] == ["Hello!", "What?"]
    assert row.ranked and row.unused == ()


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([USER, {"from": "narrator", "value": "x"}], "field 'messages[1].from' must be one of human, user, gpt"),
        ([USER, {"from": "gpt"}], "field 'messages[1].value' is missing"),
        ([USER, {"from": "function_call", "value": "add(2)"}], "'messages[1].value' must be an object or a list"),
        ([USER, GOOD | {"tool_calls": "add"}], "'messages[1].tool_calls' must be an object or a list"),
        ([USER, GOOD | {"tool_calls": 3}], "'messages[1].tool_calls' must hold tool calls"),
        ([USER, {"role": "assistant", "content": None}], "field 'messages[1].content' is null"),
        (
            [USER, GOOD | {"reasoning_content": "\ud800"}],
            "'messages[1].reasoning_content' contains half a surrogate pair",
        ),
    ],
)
def test_messages_that_cannot_be_read_are_named(messages, complaint, write_lines):
    with pytest.raises(UserError) as caught:
        list(read_rows(write_lines([{"messages": messages}])))
    assert complaint in str(caught.value)


def test_values_of_a_message_that_json_does_not_have_are_reported_as_unused(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    messages = [USER | {"at": datetime.datetime(2024, 1, 1)}, GOOD | {"at": datetime.datetime(2024, 1, 2)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), tmp_path / "dates.parquet")
    (row,) = read_rows(tmp_path / "dates.parquet")
    assert (row.prompt, row.responses[0].fields, row.unused) == ((USER,), {}, ("messages[].at",))
