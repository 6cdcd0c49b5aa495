"""A record of a row is read back as an equal row."""

import dataclasses
import json

from nemo_rao.batch import Response, Row
from nemo_rao.rows.reading import read_rows
from nemo_rao.rows.writing import record_of

USER = {"role": "user", "content": "Hi?"}
FULL = Row(
    ({"role": "system", "content": "s"}, USER | {"name": "n"}),
    (
        Response("a", 1.5, fields={"reasoning_content": "r", "thinking": ["t"]}, truncated=True, plain_content=" a"),
        Response("", None, fields={"tool_calls": [{"function": {"name": "f"}}]}, weight=0.0),
        Response("c", continuation=(USER, {"role": "assistant", "content": "d", "weight": 0.0})),
    ),
    "location",
    ranked=True,
    reference_rewards=(0.5, -1.0),
    template_fields={"tools": [{"name": "f"}], "documents": [{"text": "x"}], "enable_thinking": False},
    plain_prompt="\n\nHuman: Hi?\n\nAssistant:",
)


def test_everything_that_a_row_holds_is_read_back(write_lines):
    plain = Row("Hi?", (Response("a"),), "location")
    for row in (FULL, plain):
        record = record_of(row)
        (again,) = read_rows(write_lines([json.loads(json.dumps(record))]))
        assert dataclasses.replace(again, location="location") == row
    assert record_of(plain) == {"prompt": "Hi?", "responses": [{"content": "a"}]}


def test_rewards_that_are_not_known_are_null_and_ensembles_have_names(write_lines):
    row = Row("Hi?", (Response("a", float("nan"), (1.0, float("nan"))),), "location")
    record = record_of(row, ensemble_names=("x", "y"))
    assert record["responses"] == [{"content": "a", "reward": None, "x": 1.0, "y": None}]
    (again,) = read_rows(write_lines([record]), reward_field=["x", "y"])
    assert again.responses[0].ensemble[0] == 1.0 and again.responses[0].reward == 1.0
