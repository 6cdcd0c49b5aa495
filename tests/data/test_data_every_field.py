"""Whatever a record holds is used, ignored by a key, reported as unused, or refused in one line."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.prompts import read_prompts
from nemo_rao.rows.reading import read_rows
from nemo_rao.rows.writing import record_of

# Texts and numbers that occur once in a record are filled in for these (see `_marked`).
TEXT, NUMBER = "<text>", "<number>"

odd = [TEXT, NUMBER, None, True, "", " ", 0, "[{'role': 'user', 'content': 3}]", "Human: a\n\nAssistant:"]
names = st.sampled_from(["role", "content", "a", "from"])
anything = st.recursive(
    st.sampled_from(odd),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3),
    max_leaves=4,
)
transcripts = ["\n\nHuman: " + TEXT, "\n\nHuman: " + TEXT + "\n\nAssistant:" + TEXT, "Human: a\n\nAssistant:"]
text = st.sampled_from([TEXT] * 6 + transcripts)
calls = st.just([{"type": "function", "function": {"name": TEXT, "arguments": {"x": NUMBER}}}])
extras: dict[str, st.SearchStrategy[Any]] = {
    "reasoning_content": text,
    "tool_calls": calls | calls.map(json.dumps),
    "name": text,
    "weight": st.sampled_from([0, 1]),
    "truncated": st.booleans(),
    "model": anything,
}
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}, optional={"a": text}), min_size=1)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": text | parts}, optional=extras
) | st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "observation", "other"]), "value": text}, optional=extras
)
user = st.fixed_dictionaries({"role": st.just("user"), "content": text})
answer = st.fixed_dictionaries({"role": st.just("assistant"), "content": text}, optional=extras)
messages = st.lists(message, max_size=4) | st.tuples(user, answer).map(list) | st.lists(user, min_size=1, max_size=1)
messages_or_text = text | messages | messages.map(json.dumps) | messages.map(repr)
side = text | answer | st.lists(answer, min_size=1, max_size=1) | messages
rewarded = {"reward": st.just(NUMBER), "label": st.booleans(), "overall_score": st.just(NUMBER), "source": anything}


def listed(content_name: str) -> st.SearchStrategy[Any]:
    response = st.fixed_dictionaries({content_name: text}, optional=extras | rewarded)
    return st.lists(response, min_size=1, max_size=2)


required: list[dict[str, st.SearchStrategy[Any]]] = [
    {"responses": listed("content")},
    {"completions": listed("response")},
    {"chosen": side, "rejected": side},
    {"chosen": text, "rejected": text},
    {"chosen_response": text, "rejected_response": text},
    {"response": text},
    {"completion": text | side},
    {"messages": messages},
    {"conversations": messages},
    {},
]
columns: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("prompt", "question", "query", "instruction", "input"), messages_or_text),
    **dict.fromkeys(("system", "context", "functions", "score_chosen", "helpfulness", "Prompt"), anything | text),
    **dict.fromkeys(("id", "source", "weight", "chat_template_kwargs"), anything),
    "history": anything | st.lists(st.lists(text, min_size=2, max_size=2), max_size=2),
    "tools": anything | calls,
    "documents": calls.map(json.dumps),
    "messages": messages,
    "ranked": st.booleans(),
    "reference_rewards": st.lists(st.just(NUMBER), max_size=2),
}


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """A record of any format with a few of all known columns, half of them with a prompt."""
    own = required[draw(st.integers(0, len(required) - 1))]
    others = draw(st.lists(st.sampled_from([name for name in columns if name not in own]), unique=True, max_size=3))
    prompt = {"prompt": text} if draw(st.booleans()) else {}
    drawn = {
        name: draw(strategy) for name, strategy in ({name: columns[name] for name in others} | prompt | own).items()
    }
    return _marked(drawn, iter(range(1000, 10**6)))


def _marked(value: Any, counter: Iterator[int]) -> Any:
    """The value with texts and numbers that occur once."""
    if isinstance(value, dict):
        return {name: _marked(entry, counter) for name, entry in value.items()}
    if isinstance(value, list):
        return [_marked(entry, counter) for entry in value]
    if value == NUMBER:
        return next(counter) + 0.5
    if isinstance(value, str):
        while TEXT in value:
            value = value.replace(TEXT, f"words {next(counter)}.", 1)
        value = value.replace(NUMBER, "7")
    return value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, mark) of each text or number that occurs once, paths as in `Row.unused`."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry, f"{path}[]")
    elif isinstance(value, float):
        yield path, str(value)
    elif isinstance(value, str):
        for part in value.split("words ")[1:]:
            yield path, f"words {part.split('.')[0]}."


@given(records(), st.sampled_from([(), ("source", "id", "responses[].model"), ("messages",)]))
def test_every_field_of_a_record_is_used_or_ignored_or_reported(tmp_path_factory, record, ignored):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text(json.dumps(record) + "\n")
    try:
        (row,) = read_rows(path, ignore_fields=ignored)
    except UserError as error:
        assert "\n" not in str(error)
        return
    kept = json.dumps([dataclasses.asdict(row)])
    reported = [name.removesuffix(" after the last answer") for name in (*row.unused, *ignored)]
    for location, mark in _leaves(record):
        assert mark in kept or _is_among(location, reported), (location, mark, row)
    _check_written(row, path)


def _is_among(location: str, paths: Iterable[str]) -> bool:
    """Whether one of the paths leads to the value or, if messages are inside a text, into it."""
    return any(location.startswith(path) or path.startswith(f"{location}[]") for path in paths)


def _check_written(row: Row, path) -> None:
    path.write_text(json.dumps(record_of(row)) + "\n")
    (again,) = read_rows(path)
    assert dataclasses.replace(again, location=row.location, unused=row.unused) == row
    assert again.unused == ()


@given(records())
def test_prompts_for_sampling_use_carry_or_report_every_field(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "fuzz_prompts.jsonl"
    path.write_text(json.dumps(record) + "\n")
    try:
        (prompt,) = read_prompts(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    kept = json.dumps(dataclasses.asdict(prompt))
    answers = ("responses", "completion", "chosen", "rejected", "response", "messages", "conversations", "score_chosen")
    for location, mark in _leaves(record):
        if not (prompt.has_responses and location.startswith((*answers, "helpfulness", "reference_rewards", "reward"))):
            assert mark in kept or _is_among(location, prompt.unused), (location, mark, prompt)
