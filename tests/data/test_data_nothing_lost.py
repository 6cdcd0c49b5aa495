"""Random records through reading, templates and checks: what is kept is whole, and what is not is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rao.data.dataset import load_preferences
from nemo_rao.data.report import Outcome
from nemo_rao.errors import UserError

NAMES = (
    *("prompt", "question", "instruction", "input", "system", "history", "tools", "messages", "conversations"),
    *("responses", "chosen", "rejected", "response", "completion", "label", "reward", "score_chosen", "ranked"),
    *("source", "id", "context", "metadata", "truncated", "weight"),
)
TOKENIZERS = ("chatml", "llama_3", "phi_3", "plain")

words = st.builds("{}x{}".format, st.text("ab é\n<>|_", max_size=4), st.text("ab é\n<>|_", max_size=4))
numbers = st.integers(-2, 2).map(float)
scalars = st.one_of(words, st.integers(-3, 3), st.booleans(), st.none(), st.just(""), st.floats(width=32))


def said_by(role: str, **extra: st.SearchStrategy) -> st.SearchStrategy[dict]:
    others = {"name": words, "reasoning_content": words, "mood": words}
    return st.fixed_dictionaries({"role": st.just(role), "content": words}, optional=others | extra)


answers = st.fixed_dictionaries(
    {"content": words, "reward": numbers},
    optional={"truncated": st.booleans(), "model": words, "weight": st.integers(0, 1), "reasoning_content": words},
)
questions = st.tuples(said_by("user")).map(list)
asked = st.one_of(words, questions, st.tuples(said_by("system"), said_by("user")).map(list))
turns = st.lists(
    st.tuples(said_by("user"), said_by("assistant", weight=st.integers(0, 1))), min_size=1, max_size=2
).map(lambda pairs: [message for pair in pairs for message in pair])
wrong = st.one_of(
    *(scalars, turns, questions, st.just([]), st.just({})),
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["critic", "tool", "user"]), "content": scalars}), max_size=3
    ),
)
VALUES: dict[str, st.SearchStrategy] = {
    "prompt": asked,
    "messages": turns,
    "conversations": turns,
    "responses": st.lists(answers, min_size=1, max_size=4),
    "history": st.lists(st.tuples(words, words).map(list), max_size=2),
    "tools": words.map(lambda name: [{"type": "function", "function": {"name": name}}]),
    "label": st.booleans(),
    "ranked": st.booleans(),
    "truncated": st.booleans(),
    "weight": st.integers(0, 1),
    "reward": numbers,
    "score_chosen": numbers,
    **dict.fromkeys(("source", "id", "metadata"), scalars),
}
SHAPES = (
    ("prompt", "responses"),
    ("prompt", "responses", "ranked"),
    ("prompt", "chosen", "rejected"),
    ("messages",),
    ("question", "response", "reward"),
    ("instruction", "input", "completion", "label"),
    ("system", "prompt", "chosen", "rejected"),
)


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """A record of a known shape, often with further columns, now and then with a wrong value."""
    names = dict.fromkeys([*draw(st.sampled_from(SHAPES)), *draw(st.lists(st.sampled_from(NAMES), max_size=1))])
    made = {name: draw(VALUES.get(name, words)) for name in names}
    if draw(st.integers(0, 7)) == 7:
        made[draw(st.sampled_from(list(made)))] = draw(wrong)
    return made


def texts_of(outcome: Outcome) -> Iterator[tuple[str, bool]]:
    """The contents that a kept row must hold, and whether each belongs to the prompt."""
    assert outcome.used is not None
    prompt = outcome.used.prompt
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        yield text, True
    for response in outcome.used.responses:
        yield response.content, False
        for later in response.continuation:
            yield later["content"], False


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "data.jsonl"


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(records(), min_size=1, max_size=4),
    tokenizer=st.sampled_from(TOKENIZERS),
    options=st.fixed_dictionaries(
        {
            "needs_rewards": st.booleans(),
            "needs_pairs": st.booleans(),
            "responses": st.sampled_from(["all", "best_worst", "best_random"]),
            "truncated": st.sampled_from(["drop", "without_end"]),
            "answers": st.sampled_from(["template", "verbatim"]),
            "ignore_fields": st.lists(st.sampled_from(NAMES[-8:]), max_size=3),
        }
    ),
)
def test_every_row_is_accounted_for_and_what_is_kept_holds_all_of_its_contents(
    rows, tokenizer, options, tokenizers, file
):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    used_tokenizer = tokenizers[tokenizer]
    outcomes: list[Outcome] = []
    given_options = options | {"needs_preference": options["needs_pairs"], "min_responses": 1 + options["needs_pairs"]}
    try:
        data = load_preferences(
            file,
            used_tokenizer,
            seq_length=256,
            bad_rows="drop",
            max_bad_rows=1,
            observer=outcomes.append,
            **given_options,
        )
    except UserError as error:
        assert "no rows left to train on" in str(error)
        return
    report = data.report
    assert report.rows_read == len(outcomes) == report.rows_kept + report.rows_dropped + report.rows_bad
    kept = [outcome for outcome in outcomes if outcome.reason is None]
    assert len(kept) == len(data) == report.rows_kept
    for outcome in outcomes:
        assert (outcome.reason is None) == (outcome.detail == "")
    for outcome, sample in zip(kept, data, strict=True):
        prompt = used_tokenizer.decode(sample.prompt)
        whole = [prompt + used_tokenizer.decode(response) for response in sample.responses]
        for text, in_prompt in texts_of(outcome):
            assert text.strip() in (prompt if in_prompt else "\0".join(whole))
        # Rows of one response a record may be of several records: of the others every column is accounted for.
        location = outcome.read.location
        record = rows[int(location.rpartition(" ")[2]) - 1]
        for name in ("source", "id", "metadata"):
            if record.get(name) is not None:
                assert (name in outcome.read.unused) is (name not in options["ignore_fields"])
                assert name in options["ignore_fields"] or report.unused[name] >= 1
        if record.get("context") and str(record["context"]).strip() and "context" not in options["ignore_fields"]:
            said = "\0".join(whole)
            assert not isinstance(record["context"], str) or " ".join(record["context"].split()) in " ".join(
                said.split()
            )
