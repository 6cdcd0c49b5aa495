"""Anthropic's transcripts are the messages that they show, and keep their text for tokenizers without a template."""

import pytest

from nemo_rao.errors import UserError
from nemo_rao.rows.reading import read_rows

ONE = "\n\nHuman: a\n\nAssistant:"
TWO = ONE + " b\n\nHuman: c\n\nAssistant:"
MESSAGES = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": TWO + " I do", "rejected": TWO + " I do not"},
        {"prompt": TWO, "chosen": " I do", "rejected": " I do not"},
        {"prompt": TWO, "chosen_response": " I do", "rejected_response": " I do not"},
        {"prompt": TWO, "responses": [{"content": " I do"}, {"content": " I do not"}], "ranked": True},
        {
            "prompt": TWO[: -len("\n\nAssistant:")],
            "chosen": "\n\nAssistant: I do",
            "rejected": "\n\nAssistant: I do not",
        },
    ],
)
def test_a_transcript_becomes_messages_and_keeps_its_text(record, write_lines):
    (row,) = read_rows(write_lines([record]))
    assert row.prompt == MESSAGES and row.plain_prompt == TWO
    assert [(one.content, one.plain_content) for one in row.responses] == [("I do", " I do"), ("I do not", " I do not")]
    assert row.ranked and row.unused == ()


def test_a_transcript_with_a_system_message_of_its_own_column_is_messages_alone(write_lines):
    (row,) = read_rows(write_lines([{"system": "s", "prompt": ONE, "chosen": " x", "rejected": " y"}]))
    assert row.prompt == ({"role": "system", "content": "s"}, MESSAGES[0])
    assert row.plain_prompt is None and [(one.content, one.plain_content) for one in row.responses] == [
        ("x", None),
        ("y", None),
    ]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"chosen": ONE + " x", "rejected": ONE}, "field 'rejected' is empty"),
        ({"chosen": TWO + " x", "rejected": TWO + " "}, "field 'rejected' is empty"),
        (
            {"chosen": TWO + " x", "rejected": ONE + " no" + TWO[len(ONE) + 2 :] + " y"},
            "must hold one assistant message",
        ),
        ({"chosen": TWO + " x", "rejected": ONE + " x"}, "field 'chosen' must hold one assistant message"),
        (
            {"prompt": ONE, "chosen": " x", "rejected": " y\n\nHuman: z"},
            "field 'rejected' must hold one assistant mess",
        ),
        ({"prompt": ONE, "chosen": " x", "rejected": " "}, "field 'rejected' is empty"),
        ({"prompt": "\n\nHuman:\n\nAssistant:", "chosen": " x", "rejected": " y"}, "'prompt[0].content' is empty"),
    ],
)
def test_a_transcript_whose_answers_are_not_one_turn_each_is_refused_as_messages_are(record, complaint, write_lines):
    with pytest.raises(UserError) as caught:
        list(read_rows(write_lines([record])))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "Human: a\n\nAssistant: b",  # a text about a conversation that is over
        "Human: a\n\nAssistant: b\n\nHuman: c",
        "Continue. Human: a\n\nAssistant:",
        "The Human: a question",
    ],
)
def test_other_texts_stay_texts(text, write_lines):
    (row,) = read_rows(write_lines([{"prompt": text, "chosen": "x", "rejected": "y"}]))
    assert (row.prompt, row.plain_prompt) == (text, None)
