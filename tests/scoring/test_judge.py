"""A judge behind HTTP: what it is asked, how often, and what becomes of each kind of answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.scoring.judge import fill
from nemo_rao.scoring.judge_config import load_judge
from nemo_rao.scoring.scorer import Pair
from tests.scoring.conftest import read_lines, wait_for, write_judge, write_lines, write_rows
from tests.scoring.judge_server import JudgeServer, Reply, by_number, completion, error

Command = Callable[..., tuple[int, str, str]]


def rewards(path: str = "out.jsonl") -> list[list[float | None]]:
    return [[response["reward"] for response in row["responses"]] for row in read_lines(path)]


EXPECTED = [[float((i + k) % 10) for k in range(2)] for i in range(6)]


def test_scores_stand_at_their_responses_in_the_files_order(judge: JudgeServer, command: Command) -> None:
    judge.delay = 0.05
    write_rows("in.jsonl")
    code, output, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, concurrency=3))
    assert code == 0, message
    assert rewards() == EXPECTED
    assert judge.most_at_once == 3
    assert "judge: 12 requests" in output
    assert [row["prompt"] for row in read_lines("out.jsonl")] == [f"prompt {i}" for i in range(6)]


def test_a_request_carries_temperature_0_the_key_and_the_keys_of_the_file(
    judge: JudgeServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-123\n")
    write_rows("in.jsonl", 1, 1)
    keys: dict[str, Any] = {"system": "Be fair.", "parameters": {"top_p": 0.5}, "api_key_variable": "MY_KEY"}
    assert command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, **keys))[0] == 0
    [request] = judge.requests
    assert request["path"] == "/v1/chat/completions" and request["headers"]["Authorization"] == "Bearer secret-123"
    assert request["temperature"] == 0 and request["top_p"] == 0.5 and request["max_tokens"] == 1024
    assert request["model"] == "small" and request["messages"][0] == {"role": "system", "content": "Be fair."}
    assert not any(b"secret-123" in file.read_bytes() for file in Path().iterdir())


def test_another_temperature_is_sent_and_is_another_question(judge: JudgeServer, command: Command) -> None:
    write_rows("in.jsonl", 1, 1)
    for temperature in (0, 0.7):
        scorer = write_judge(judge.url, temperature=temperature)
        assert command("in.jsonl", "out.jsonl", "--overwrite", "--scorer", scorer)[0] == 0
    assert [request["temperature"] for request in judge.requests] == [0, 0.7]


def test_braces_in_texts_and_template_stay_as_they_are() -> None:
    pair = Pair("{response} {0} \\1", "{prompt} {x!r} }{", "here")
    assert fill("{a} {prompt}|{response} {}", pair) == "{a} {response} {0} \\1|{prompt} {x!r} }{ {}"


def test_a_prompt_of_messages_is_asked_about_with_its_roles(judge: JudgeServer, command: Command) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    for prompt in (messages, messages[1:]):
        write_lines("in.jsonl", {"prompt": prompt, "responses": [{"content": "a 3"}]})
        assert command("in.jsonl", "out.jsonl", "--overwrite", "--scorer", write_judge(judge.url))[0] == 0
        assert read_lines("out.jsonl")[0]["prompt"] == prompt
    first, second = judge.asked
    assert "<prompt>system: S\n\nuser: U</prompt>" in first and "<prompt>U</prompt>" in second


def test_the_same_question_is_asked_once_within_a_run_and_over_runs(judge: JudgeServer, command: Command) -> None:
    row = {"prompt": "p", "responses": [{"content": "a 3"}, {"content": "a 3"}, {"content": "b 4"}]}
    write_lines("in.jsonl", row, row)
    assert command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url))[0] == 0
    assert set(judge.asked.values()) == {1} and len(judge.asked) == 2
    # Another pattern reads the same answers; another template or scale is another question.
    again = write_judge(judge.url, pattern=r"Score: (\d)")
    code, output, _ = command("in.jsonl", "again.jsonl", "--scorer", again)
    assert code == 0 and len(judge.requests) == 2 and "judge: 0 requests" in output
    assert rewards("again.jsonl") == [[3.0, 3.0, 4.0]] * 2
    other = write_judge(judge.url, template="<response>{response}</response>?")
    assert command("in.jsonl", "other.jsonl", "--scorer", other)[0] == 0
    assert len(judge.requests) == 4


@pytest.mark.parametrize(
    "first",
    [
        error(429, Retry_After="0"),
        error(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
        error(500),
        error(503),
        (200, {}, b"<html>busy</html>"),
        (200, {}, b'{"choices": []}'),
    ],
    ids=["429", "429-date", "500", "503", "html", "empty"],
)
def test_what_may_pass_is_asked_again(command: Command, first: Reply) -> None:
    write_rows("in.jsonl")
    with JudgeServer(lambda text, times: first if times <= 2 else by_number(text, times)) as server:
        code, _, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(server.url))
    assert code == 0, message
    assert rewards() == EXPECTED and set(server.asked.values()) == {3}


def test_a_judge_that_asks_to_wait_is_left_alone_as_long(command: Command) -> None:
    write_rows("in.jsonl", 1, 1)
    with JudgeServer(
        lambda text, times: error(429, Retry_After="0.5") if times == 1 else completion("Score: 1")
    ) as one:
        start = time.monotonic()
        assert command("in.jsonl", "out.jsonl", "--scorer", write_judge(one.url))[0] == 0
    assert time.monotonic() - start >= 0.5


@pytest.mark.parametrize(
    ("reply", "keys", "parts"),
    [
        (error(500, "on fire"), {}, ("asked 3 times", "500", "on fire")),
        (error(429), {"retries": 0}, ("asked once", "429")),
        (error(401, "wrong key sk-secret"), {"api_key_variable": "MY_KEY"}, ("401", "wrong key ***", "Check the key")),
        (error(403), {}, ("403", "no key was sent", "Set api_key_variable")),
        (error(404, "no such model"), {}, ("404", "no such model", "Check base_url, model")),
        (error(400, "bad parameter"), {}, ("400", "bad parameter", "Check base_url, model and parameters")),
        (error(302, Location="http://x/"), {}, ("302", "Check base_url")),
        ((200, {}, b"<html>"), {}, ("not a chat completion (<html>)", "Check base_url")),
    ],
    ids=["500", "429", "401", "403", "404", "400", "302", "html"],
)
def test_a_judge_that_fails_stops_the_run_in_one_line_that_does_not_show_the_key(
    command: Command, monkeypatch: pytest.MonkeyPatch, reply: Reply, keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    write_rows("in.jsonl")
    with JudgeServer(lambda *_: reply) as server:
        code, output, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(server.url, **keys))
    assert code == 1 and message.startswith("error: in.jsonl line ") and message.count("\n") == 1, message
    assert all(part in message for part in (*parts, server.url, "0 of 6 rows are kept in out.jsonl.part.jsonl"))
    assert "sk-secret" not in output + message and not Path("out.jsonl").exists()


def test_a_judge_that_does_not_answer_in_time_or_is_not_there_is_named(command: Command) -> None:
    write_rows("in.jsonl", 2)
    with JudgeServer(delay=10) as server:
        code, _, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(server.url, timeout=0.5, retries=1))
        assert code == 1 and "asked 2 times, the last time: no answer within 0.5 s" in message
        wait_for(lambda: max(server.asked.values(), default=0) == 2)  # a busy server reads it after it was given up
    code, _, message = command("in.jsonl", "other.jsonl", "--scorer", write_judge(server.url, retries=1))
    assert code == 1 and "ConnectError" in message and message.count("\n") == 1


def test_an_answer_that_is_no_score_is_asked_for_again_and_then_counted_by_its_reason(command: Command) -> None:
    cut = "<think>A first guess would be Score: 3, but"

    def reply(text: str, times: int) -> Reply:
        if "answer 2" in text:  # cut off in its thinking, at max_tokens, and then whole
            return completion([{"type": "text", "text": "Score: 2"}]) if times == 2 else completion(cut, "length")
        if "answer 3" in text:
            return completion(cut) if times == 1 else completion("Score: 3", "length")
        if "answer 4" in text:
            return completion("Score: 7, no: Score: 4") if times == 2 else completion("Score: 11")
        if "answer 5" in text:
            return completion("The answer says Score: 5.\nScore: two")
        return by_number(text, times)

    write_rows("in.jsonl")
    with JudgeServer(reply) as server:
        given = ("--scorer", write_judge(server.url), "--max-missing")
        code, output, message = command("in.jsonl", "out.jsonl", *given, "0.4")
        assert code == 0, message
        asked = sum(server.asked.values())
        code, _, message = command("in.jsonl", "fewer.jsonl", *given, "0.3")
        assert code == 1 and message.count("\n") == 1 and not Path("fewer.jsonl").exists()
        assert "column judge: 4 of 12 responses have no score, more than --max-missing 0.3 allows" in message
        assert "6 of 6 rows are kept" in message and command("in.jsonl", "fewer.jsonl", *given, "0.4")[0] == 0
        assert sum(server.asked.values()) == asked and Path("fewer.jsonl").read_text() == Path("out.jsonl").read_text()
    assert rewards() == [[None if score in (3, 5) else score for score in row] for row in EXPECTED]
    assert {times for text, times in server.asked.items() if any(f"answer {n}" in text for n in (2, 3, 4, 5))} == {2}
    found = json.loads(Path("out.jsonl.stats.json").read_text())
    assert found["without_score"] == {
        "judge": {"answer cut off (raise max_tokens)": 2, "no score in the form of pattern": 2}
    }
    assert found["notes"]["judge"] == {
        "requests": 12 + 8,
        "questions answered before": 0,
        "answers asked for again: answer cut off (raise max_tokens)": 4,
        "answers asked for again: score outside low and high": 2,
        "answers asked for again: no score in the form of pattern": 2,
    }
    assert found["columns"]["judge"]["missing"] == found["reward"]["missing"] == 4
    first = "(the first: in.jsonl line 3, response 2: 'Score: 3' (answer 2))"
    assert f"judge: responses without a score: 2 answer cut off (raise max_tokens) {first}" in output


def test_nonsense_stops_the_run_where_asked_and_where_there_is_nothing_else(command: Command) -> None:
    write_rows("in.jsonl", 30)
    with JudgeServer(lambda *_: completion("I would rather not {say}.")) as server:
        code, _, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(server.url, attempts=1))
        assert code == 1 and message.count("\n") == 1
        assert "no score in 20 answers" in message and "I would rather not" in message and "pattern" in message
        assert len(server.requests) < 20 + 2 * 16
    with JudgeServer(lambda text, times: completion("?") if "4 of 4.0" in text else by_number(text, times)) as server:
        scorer = write_judge(server.url, attempts=1, model="other")
        code, _, message = command("in.jsonl", "strict.jsonl", "--scorer", scorer, "--strict", "--rows-at-once", "2")
    assert code == 1 and "in.jsonl line 5, response 1: judge gave no score" in message and "--strict" in message
    assert "4 of 30 rows are kept" in message


def test_a_response_that_gets_no_answer_alone_has_no_reward_and_its_reason_is_counted(command: Command) -> None:
    """A refused question is asked again by the next run, which may have a larger server; other answers are kept."""
    without = {
        "2.1": error(400, "context too long"),
        "3.1": completion(None, refusal="Score: 3"),
        "4.1": completion("Score: 5", "content_filter"),
        "5.1": completion([{"type": "image_url", "image_url": {}}]),
    }

    def reply(text: str, times: int) -> Reply:
        found = [said for response, said in without.items() if f"of {response}" in text]
        return found[0] if found else by_number(text, times)

    write_rows("in.jsonl")
    with JudgeServer(reply) as server:
        scorer = write_judge(server.url, attempts=1)
        given = ("in.jsonl", "out.jsonl", "--scorer", scorer, "--rows-at-once", "1", "--max-missing", "0.4")
        code, _, message = command(*given)
        assert code == 0, message
        assert rewards() == [*EXPECTED[:2], *([row[0], None] for row in EXPECTED[2:])]
        assert json.loads(Path("out.jsonl.stats.json").read_text())["without_score"]["judge"] == {
            "question rejected by the endpoint (400)": 1,
            "the model refused to answer": 1,
            "answer not finished (finish_reason content_filter)": 1,
            "the answer contains a part of type 'image_url', from which no text can be read": 1,
        }
        del without["2.1"]
        assert command(*given, "--overwrite")[0] == 0 and sum(server.asked.values()) == 12 + 1
    assert rewards()[2] == EXPECTED[2]


@pytest.mark.parametrize(
    ("content", "score"),
    [
        ([{"type": "thinking", "thinking": "Score: 1"}, {"type": "text", "text": "Fine.\nScore: "}, "8"], 8.0),
        ({"type": "text", "text": "Score: 8"}, 8.0),
        ([{"type": "refusal", "refusal": "Score: 8"}], None),
        ([{"type": "image_url", "image_url": {}}], "a part of type 'image_url'"),
        (8, "a part that is int"),
    ],
)
def test_an_answer_in_parts_is_their_text_or_its_kind_is_named(
    content: object, score: float | str | None, command: Command
) -> None:
    write_rows("in.jsonl", 1, 1)
    with JudgeServer(lambda *_: completion(content)) as server:
        scorer = write_judge(server.url, attempts=1)
        code, _, message = command("in.jsonl", "out.jsonl", "--scorer", scorer, "--max-missing", "1")
    if isinstance(score, str):
        assert code == 1 and score in message and message.count("\n") == 1
    else:
        assert code == 0 and rewards() == [[score]], message


def test_the_scale_is_part_of_the_judges_prompt(judge: JudgeServer, command: Command) -> None:
    write_lines("in.jsonl", {"prompt": "{low}", "responses": [{"content": "3 {high}"}]})
    settings = f"base_url: {judge.url}\nmodel: small\nhigh: 5\n"
    Path("based.yaml").write_text(f"based_on: helpfulness\n{settings}")
    Path("own.yaml").write_text(f"low: -2.5\ntemplate: '<response>{{response}}</response>'\n{settings}")
    for name in ("based", "own"):
        assert command("in.jsonl", f"{name}.jsonl", "--scorer", f"judge:{name}.yaml")[0] == 0
    based, own = judge.asked
    assert "from 1 (useless)\nto 5 (could" in based and "{low}" in based and "3 {high}" in based
    assert own == "<response>3 {high}</response>\n\nThe score is a number from -2.5 to 5."


def test_another_endpoint_is_another_judge(judge: JudgeServer, command: Command) -> None:
    write_rows("in.jsonl", 1, 1)
    with JudgeServer(lambda *_: completion("Score: 9")) as other:
        for url in (judge.url, judge.url + "/", other.url):
            assert command("in.jsonl", "out.jsonl", "--overwrite", "--scorer", write_judge(url))[0] == 0
    assert len(judge.requests) == len(other.requests) == 1 and rewards() == [[9.0]]


def test_the_judge_sees_all_that_belongs_to_prompt_and_response(judge: JudgeServer, command: Command) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    pair = Pair(
        ({"role": "user", "content": "U"}, {"role": "assistant", "content": "", "tool_calls": [call]}),
        "R",
        "here",
        {"reasoning_content": "because"},
        {"tools": [{"name": "add"}]},
    )
    asked = fill("{prompt}|{response}", pair)
    calls = json.dumps([call])
    assert (
        asked
        == f'tools: [{{"name": "add"}}]\n\nuser: U\n\nassistant: tool_calls: {calls}|R\nreasoning_content: because'
    )


def test_the_packages_judges_can_be_used(judge: JudgeServer, command: Command) -> None:
    write_rows("in.jsonl", 2)
    for name, high in (("helpfulness", 10), ("translation", 100)):
        Path(f"{name}.yaml").write_text(f"based_on: {name}\nbase_url: {judge.url}\nmodel: small\nlow: 0\n")
        config, _ = load_judge(f"{name}.yaml")
        assert config.high == high and config.low == 0
        assert command("in.jsonl", f"{name}.jsonl", "--scorer", f"judge:{name}.yaml")[0] == 0
        assert rewards(f"{name}.jsonl") == EXPECTED[:2]


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"api_key": "sk-1"}, ("api_key: API keys must not be stored in this file", "api_key_variable: NAME")),
        ({"timeot": 3}, ("unknown key timeot", "did you mean timeout?")),
        ({"timeout": 0}, ("timeout=0", "> 0")),
        ({"concurrency": "many"}, ("concurrency='many'", "an integer")),
        ({"model": None}, ("model: is not set",)),
        ({"template": "Good?"}, ("template", "{response}")),
        ({"pattern": "(("}, ("pattern='(('", "is not a regular expression")),
        ({"pattern": r"\d"}, ("has 0 groups",)),
        ({"low": 3, "high": 3}, ("low=3", "high=3")),
        ({"high": None}, ("high: is not set", "high: 10")),
        ({"base_url": "localhost:8000"}, ("base_url='localhost:8000'", "http://localhost:8000/v1")),
        ({"base_url": "http://u:pw@host/v1"}, ("base_url: contains a password",)),
        ({"based_on": "nope"}, ("based_on='nope'", "helpfulness, translation")),
        ({"parameters": {"temperature": 1}}, ("parameters.temperature",)),
        ({"batch_size": 4}, ("batch_size: applies only to a model_folder", "Leave it out")),
        ({"model_folder": "m"}, ("base_url: applies only to an endpoint", "Leave one of them out")),
        ({"api_key_variable": "NOT_SET"}, ("NOT_SET", "not set. Export it")),
        ({"api_key_variable": "BROKEN"}, ("BROKEN", "characters that no key has", "Export it again")),
    ],
)
def test_a_wrong_key_of_the_judges_file_is_named_before_anything_is_asked(
    judge: JudgeServer, command: Command, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], parts: tuple[str, ...]
) -> None:
    monkeypatch.setenv("BROKEN", "sk-1\nsk-2")
    write_rows("in.jsonl")
    code, output, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, **keys))
    assert code == 2 and output == "" and message.startswith("error: ") and message.count("\n") == 1
    assert all(part in message for part in ("judge.yaml", *parts)), message
    assert "sk-1" not in message and "pw" not in message
    assert not judge.requests and sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "judge.yaml"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a: [", ("is not valid YAML",)), ("- a", ("must be a mapping of keys to values",)), (None, ("cannot be read",))],
)
def test_a_judges_file_that_cannot_be_read_is_named(command: Command, text: str | None, parts: tuple[str, ...]) -> None:
    write_rows("in.jsonl")
    if text is not None:
        Path("judge.yaml").write_text(text)
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", "judge:judge.yaml")
    assert code == 2 and message.count("\n") == 1 and all(part in message for part in ("judge.yaml", *parts)), message


def test_a_file_of_answers_that_is_something_else_is_named(judge: JudgeServer, command: Command) -> None:
    write_rows("in.jsonl")
    Path("mine.sqlite").write_text("not a database, but long enough to be taken for something else" * 20)
    code, _, message = command("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, cache="mine.sqlite"))
    assert code == 1 and "mine.sqlite" in message and "cache" in message and message.count("\n") == 1
