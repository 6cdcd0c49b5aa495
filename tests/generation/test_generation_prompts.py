"""Prompts for sampling: what of a row is asked, carried along, or reported."""

import pytest

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.prompts import Prompt, digest_of, read_prompts

USER = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be kind."}
GOOD = {"role": "assistant", "content": "Hello!"}
TOOLS = [{"name": "add"}]
HUMAN = "\n\nHuman: Hi?\n\nAssistant:"


@pytest.fixture
def lines(tmp_path):
    import json

    def write(*records) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "Hi?", "answer": 4, "id": None}, {"content": "Hi?", "fields": {"answer": 4}}),
        ({"question": "Hi?", "system": "Be kind.", "answer": 4}, {"content": (SYSTEM, USER), "fields": {"answer": 4}}),
        ({"instruction": "Add.", "input": "2, 5"}, {"content": "Add.\n2, 5"}),
        ({"prompt": '[{"role": "user", "content": "Hi?"}]', "tools": TOOLS}, {"template_fields": {"tools": TOOLS}}),
        ({"messages": [SYSTEM, USER]}, {"content": (SYSTEM, USER)}),
        ({"conversations": [{"from": "human", "value": "Hi?", "weight": 1}], "id": 1}, {"fields": {"id": 1}}),
        ({"prompt": HUMAN}, {"plain": HUMAN}),
        # rows with responses, whose other fields are not carried
        ({"prompt": "Hi?", "responses": [{"content": "x", "model": "m"}], "id": 1, "tools": TOOLS}, {
            "content": "Hi?", "template_fields": {"tools": TOOLS}, "unused": ("id", "responses[].model"),
            "has_responses": True, "fields": {"id": 1},
        }),
        ({"messages": [USER, GOOD, USER], "prompt": "Hi?"}, {
            "unused": ("messages[] after the last answer",), "has_responses": True
        }),
        ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, {"plain": HUMAN, "has_responses": True}),
    ],
)  # fmt: skip
def test_every_field_of_a_row_is_asked_carried_or_reported(record, asked, lines):
    (prompt,) = read_prompts(lines(record))
    assert prompt == Prompt(**{"content": (USER,), "location": prompt.location, "fields": {}} | asked)
    assert prompt.carried == ({} if prompt.has_responses else prompt.fields)
    assert prompt.as_row() == Row(
        prompt.content, (), prompt.location, template_fields=prompt.template_fields, plain_prompt=prompt.plain
    )


def test_prompts_that_would_lose_a_column_are_refused_and_keys_say_what_it_is(lines):
    path = lines({"prompt": "Hi?", "context": "of two"})
    with pytest.raises(UserError, match="field 'context' looks like part of the prompt"):
        read_prompts(path)
    assert read_prompts(path, ignore_fields=["context"])[0].fields == {}
    (prompt,) = read_prompts(lines({"q": "Hi?", "who": "Be kind."}), columns={"prompt": "q", "system": "who"})
    assert prompt.content == (SYSTEM, USER)


def test_a_system_message_goes_before_a_transcript_whose_text_then_is_not_used(lines):
    (prompt,) = read_prompts(lines({"prompt": HUMAN}), system="Be kind.")
    assert (prompt.content, prompt.plain) == ((SYSTEM, USER), None)


def test_one_prompt_is_asked_once_for_rows_of_one_response_unless_its_tools_differ(lines):
    path = lines(
        *({"prompt": "Hi?", "completion": text, "tools": t} for text, t in [("a", []), ("b", []), ("c", TOOLS)])
    )
    assert [prompt.template_fields for prompt in read_prompts(path)] == [{}, {"tools": TOOLS}]


def test_the_digest_knows_what_the_template_is_given(lines):
    plain, tools = read_prompts(lines({"prompt": "Hi?"})), read_prompts(lines({"prompt": "Hi?", "tools": TOOLS}))
    assert digest_of(plain) != digest_of(tools)
