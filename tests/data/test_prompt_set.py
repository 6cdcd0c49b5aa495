"""Prompts of a run that samples its own responses: what is kept, and that nothing of the rest is lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.data.encode import Encoder, load_tokenizer
from nemo_rao.data.prompt_set import load_prompts
from nemo_rao.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"prompt": "short", "answer_key": "42"},
    {"prompt": "a much longer prompt " * 9},
    {"prompt": "asked", "responses": [{"content": "x", "reward": 1.0}, {"content": "y", "reward": 0.0}]},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]},
]


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "prompts.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(made)


def test_prompts_are_as_a_policy_is_asked_and_the_rest_is_counted(path: str, tokenizers: dict[str, Any]) -> None:
    data, rows = load_prompts(path, tokenizers["chatml"], longest=60, set_by="the test's limit")
    assert len(data) == len(rows) == 3
    tokenizer = tokenizers["chatml"]
    encoder = Encoder(tokenizer)
    for number, row in enumerate(rows):
        assert row.responses == () and data[number].responses == ()
        assert tokenizer.decode(data[number].prompt.tolist()).endswith(encoder.prompt_text(row))
    assert [row.location.rpartition(" ")[2] for row in rows] == ["1", "3", "4"]
    assert data.contents_fingerprint() != data.fingerprint()
    assert data.reward_summary().mean is None and data.num_responses == 0
    text = data.report.text()
    assert "3 of 4 rows kept" in text
    assert "1 dropped (longer than 60 tokens: the test's limit; first: " in text and "line 2" in text
    assert "1 row: responses in the file are not used, as the run samples its own" in text
    assert "unused fields: answer_key" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"strict": True},
            r"line 2: the prompt has \d+ tokens, more than 60: .* \(strict: no row may be dropped\)",
        ),
        ({"longest": 1}, "no prompt is left to sample from: 0 of 4 rows kept"),
    ],
)
def test_what_cannot_be_is_refused(path: str, tokenizers: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_prompts(path, tokenizers["chatml"], **{"longest": 60, "set_by": "the test's limit"} | given)


def test_prompts_that_begin_differently_are_refused_where_the_objective_compares_them(
    tmp_path: Path, tokenizers: dict[str, Any], tokenizer_folder: Path
) -> None:
    made = tmp_path / "prompts.jsonl"
    made.write_text('{"prompt": "a b"}\n{"prompt": "Hello"}\n')
    common = {"longest": 60, "set_by": "the test's limit", "chat_template": "never"}
    asks: dict[str, Any] = {"needs_shared_first_token": True, "needed_by": "objective rao"}
    assert len(load_prompts(str(made), tokenizers["plain"], **asks, **common)[0]) == 2  # both begin with <|begin|>
    bare = load_tokenizer(tokenizer_folder)
    bare._tokenizer.post_processor = None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"objective rao needs .*line 1 begins with 'a' and .*line 2 with 'Hello'"):
        load_prompts(str(made), bare, **asks, **common)
