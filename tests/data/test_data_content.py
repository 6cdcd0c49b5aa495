"""Which parts of a message's fields a rendered text lacks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_rao.data.content import find_missing_part, unrendered_call
from nemo_rao.errors import UserError


def call(name: object = "add_up", arguments: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("calls", "text", "missing"),
    [
        ([call(arguments={"first": "one"})], 'add_up({"first": "one"})', None),
        ([call(arguments={"first": "one"})], "add_up(first)", "one"),
        ([call(arguments={"first": "one"})], "add_up(one)", "first"),
        ([call(arguments={"first": "one"})], "(first=one)", "add_up"),
        ([call(), call("second")], "add_up()", "second"),
        ([call(arguments={"all": ["one", {"inner": "two"}, 3, None]})], "add_up(all=[one, {inner: two}, 3])", None),
        ([call(arguments={"all": ["one", {"inner": "two"}]})], "add_up(all=[one, {inner}])", "two"),
        ([call(arguments=("one", "two"))], "add_up(one)", "two"),
        # Arguments that are JSON text: as they are, serialized again, or left out.
        ([call(arguments='{"first":"one"}')], 'add_up({"first":"one"})', None),
        ([call(arguments='{"first":"one"}')], "add_up(first='one')", None),
        ([call(arguments='{"first":"one"}')], "add_up(first)", "one"),
        ([call(arguments="first, broken")], "add_up(first)", "first, broken"),
        # JSON-escaped in the text.
        ([call(arguments={"first": 'a "b"\n'})], r'add_up({"first": "a \"b\"\n"})', None),
        ([{"name": "add_up", "arguments": {"first": "one"}}], "add_up(first)", "one"),  # without "function"
        ([call(name=7), {"function": "odd"}, "odd"], "", None),  # nothing to look for
    ],
)
def test_each_name_and_argument_of_a_tool_call_is_looked_for(calls: Any, text: str, missing: str | None) -> None:
    assert find_missing_part("tool_calls", calls, text) == missing
    assert find_missing_part("tool_calls", tuple(calls), text) == missing


def test_of_tools_the_names_are_looked_for_and_of_texts_all() -> None:
    tools = [{"type": "function", "function": {"name": "add_up", "arguments": "not looked for"}}]
    assert find_missing_part("tools", tools, "# add_up") is None
    assert find_missing_part("tools", tools, "# add") == "add_up"
    assert find_missing_part("reasoning_content", " two and two\n", "<think>two and two</think>") is None
    assert find_missing_part("reasoning_content", "two and two", "<think>two</think>") == "two and two"
    assert find_missing_part("documents", ["not looked for"], "") is None
    assert find_missing_part("tool_calls", {"not": "a list"}, "") is None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_tool_call_that_does_not_change_the_rendering_is_found(most: int) -> None:
    def render(messages: Any, _: Any) -> str:
        return "|".join(json.dumps(list(message.get("tool_calls") or ())[:most]) for message in messages)

    calls = [call(str(number)) for number in range(3)]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": calls[:1]}]
    assert unrendered_call(messages, render(messages, {}), render) is None, "a single call is checked as a field"
    messages.append({"role": "assistant", "tool_calls": calls})
    found = unrendered_call(messages, render(messages, {}), render)
    assert found == (None if most == 3 else calls[most])


def test_a_tool_call_without_which_nothing_can_be_rendered_counts_as_rendered() -> None:
    def render(messages: Any, _: Any) -> str:
        if len(messages[0]["tool_calls"]) < 2:
            raise UserError("the template needs two")
        return "the same text"

    messages = [{"role": "assistant", "tool_calls": [call("a"), call("b")]}]
    assert unrendered_call(messages, "the same text", render) is None
