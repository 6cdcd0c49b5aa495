"""Messages about rows, whose keys a command has options for."""

from __future__ import annotations

import pytest

from nemo_rao.errors import UserError
from nemo_rao.rows.option_names import READING, OptionNames

NAMES = OptionNames({**READING, "answers": "--answers"}, {"Leave data.reward_field unset": "use --scorer column"})
OF_A_BENCHMARK = OptionNames({"columns": "call it {name} in the file"})


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (NAMES, "or name it (data.columns.prompt=ask)", "or name it (--column prompt=ask)"),
        (NAMES, "data.columns.prompt is 'ask'. Correct data.columns", "--column prompt is 'ask'. Correct --column"),
        (NAMES, "unwanted (data.ignore_fields=[a,b])", "unwanted (--ignore-field a --ignore-field b)"),
        (NAMES, "add source to data.ignore_fields, or", "pass --ignore-field source, or"),
        (NAMES, "Set data.answers=verbatim, or", "Set --answers verbatim, or"),
        (NAMES, "Leave data.reward_field unset", "use --scorer column"),
        # Keys of training, and names of files, stay.
        (NAMES, "unless data.truncated=without_end", "unless data.truncated=without_end"),
        (NAMES, "x/data.columns.jsonl line 2, data.answers.json", "x/data.columns.jsonl line 2, data.answers.json"),
        (NAMES, "data.columns.jsonl.gz line 2", "data.columns.jsonl.gz line 2"),
        (OF_A_BENCHMARK, "name it (data.columns.prompt=NAME)", "name it (call it prompt in the file)"),
    ],
)
def test_keys_are_named_as_the_command_has_them(names: OptionNames, text: str, expected: str) -> None:
    assert names(text) == expected
    with pytest.raises(UserError) as raised, names.in_errors():
        raise UserError(text)
    assert str(raised.value) == expected
