"""A run that was stopped - killed, interrupted, out of disk - goes on where it was, and asks nothing twice."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.runtime.part_file import PartFile
from tests.scoring.conftest import read_lines, wait_for, write_judge, write_lines, write_rows
from tests.scoring.judge_server import JudgeServer, Reply, by_number, error

Command = Callable[..., tuple[int, str, str]]
PART = Path("out.jsonl.part.jsonl")
COUNTING = """
import os
def score(prompt, response):
    with open("calls", "a") as file:
        file.write(prompt + "/" + response + "\\n")
    if os.path.exists("stop") and prompt == "prompt 4":
        raise RuntimeError("stopped")
    return len(response)
"""


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nemo_rao", "score", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_killed_in_the_middle_goes_on_and_asks_nothing_twice_that_was_answered(command: Command) -> None:
    write_rows("in.jsonl", 40)
    with JudgeServer(delay=0.02) as judge:
        arguments = ("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, concurrency=4), "--rows-at-once", "4")
        run = start(*arguments)
        wait_for(lambda: num_lines(PART) > 10)
        run.kill()
        run.communicate()
        assert run.returncode == -signal.SIGKILL and not Path("out.jsonl").exists()
        done = num_lines(PART) - 1
        assert 0 < done < 40
        PART.write_bytes(PART.read_bytes() + b'{"prompt": "half a li')
        before = sum(judge.asked.values())
        code, output, message = command(*arguments)
        assert code == 0, message
        assert f"resuming after {done} of 40 rows" in output
        # Only what was on its way when the kill came is asked again.
        assert sum(judge.asked.values()) <= 80 + 4 and before < 80
        assert [row["prompt"] for row in read_lines("out.jsonl")] == [f"prompt {i}" for i in range(40)]
        rewards = [[response["reward"] for response in row["responses"]] for row in read_lines("out.jsonl")]
        assert rewards == [[(i + k) % 10 for k in range(2)] for i in range(40)]
        assert not PART.exists()
    notes = json.loads(Path("out.jsonl.stats.json").read_text())["notes"]["judge"]  # of all rows, not of the last run
    assert notes["requests"] + notes["questions answered before"] == 80


def test_ctrl_c_ends_at_once_with_code_130_and_the_run_goes_on(command: Command) -> None:
    write_rows("in.jsonl", 40)
    with JudgeServer(lambda text, times: by_number(text, times)) as judge:
        judge.delay = 0.02
        scorer = write_judge(judge.url, concurrency=4)
        run = start("in.jsonl", "out.jsonl", "--scorer", scorer, "--rows-at-once", "4")
        wait_for(lambda: num_lines(PART) > 5)
        judge.delay = 30  # what is under way now would take long
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, message = run.communicate(timeout=10)
        assert run.returncode == 130 and message.startswith("interrupted. ") and message.count("\n") == 1
        assert "rows are kept in out.jsonl.part.jsonl; the same command resumes" in message
        judge.delay = 0
        assert command("in.jsonl", "out.jsonl", "--scorer", scorer)[0] == 0
    assert len(read_lines("out.jsonl")) == 40


def test_a_judge_that_fails_for_a_while_costs_no_answer(command: Command) -> None:
    down = True

    def reply(text: str, times: int) -> Reply:
        return error(503) if down and "prompt 3" in text else by_number(text, times)

    write_rows("in.jsonl")
    with JudgeServer(reply) as judge:
        arguments = ("in.jsonl", "out.jsonl", "--scorer", write_judge(judge.url, retries=0, concurrency=1))
        code, _, message = command(*arguments)
        assert code == 1 and "in.jsonl line 4, response 1" in message
        down = False
        assert command(*arguments)[0] == 0
        assert sum(judge.asked.values()) == 12 + 1
    assert len(read_lines("out.jsonl")) == 6


def test_rows_in_the_part_file_are_not_scored_again(command: Command) -> None:
    write_rows("in.jsonl")
    Path("rules_that_count.py").write_text(COUNTING)
    Path("stop").touch()
    arguments = ("in.jsonl", "out.jsonl", "--scorer", "rule:rules_that_count:score", "--rows-at-once", "1")
    assert command(*arguments)[0] == 1
    assert num_lines(PART) == 1 + 4
    Path("stop").unlink()
    code, output, _ = command(*arguments)
    assert code == 0 and "resuming after 4 of 6 rows" in output
    calls = Path("calls").read_text().splitlines()
    assert sorted({call: calls.count(call) for call in calls}.values()) == [1] * 11 + [2]


def stopped_run(command: Command, *arguments: str) -> None:
    write_rows("in.jsonl")
    Path("rules_that_stop.py").write_text(COUNTING)
    Path("stop").touch()
    assert command("in.jsonl", "out.jsonl", "--scorer", "a=rule:rules_that_stop:score", "--rows-at-once", "1")[0] == 1
    Path("stop").unlink()


@pytest.mark.parametrize(
    ("change", "scorers", "parts"),
    [
        (lambda: write_rows("in.jsonl", 7), ["a=rule:rules_that_stop:score"], ("started with a different input",)),
        (lambda: None, ["b=rule:rules_that_stop:score"], ("started with columns=['a'], not columns=['b']",)),
        (lambda: None, ["a=rule:json:dumps"], ("started with a different scorer a",)),
        (
            lambda: Path("rules_that_stop.py").write_text(COUNTING + "# changed\n"),
            ["a=rule:rules_that_stop:score"],
            ("started with a different scorer a",),
        ),
        (lambda: PART.write_text('{"mine": 1}\n'), ["a=rule:rules_that_stop:score"], ("line 1: was not written by",)),
    ],
)
def test_a_part_file_of_other_scores_is_refused_and_named(
    command: Command, change: Callable[[], Any], scorers: Sequence[str], parts: Sequence[str]
) -> None:
    stopped_run(command)
    change()
    before = PART.read_bytes()
    code, _, message = command("in.jsonl", "out.jsonl", *(text for one in scorers for text in ("--scorer", one)))
    assert code == 2 and message.count("\n") == 1
    assert all(part in message for part in ("error: out.jsonl.part.jsonl", *parts)), message
    assert "delete" in message.lower(), message
    assert PART.read_bytes() == before


def test_a_header_cut_short_or_an_empty_part_file_is_begun_anew(command: Command) -> None:
    stopped_run(command)
    whole = PART.read_bytes()
    for cut in (b"", whole[:20], whole[: whole.index(b"\n") + 1], whole + b"\0\0\0\0"):
        PART.write_bytes(cut)
        assert command("in.jsonl", "out.jsonl", "--scorer", "a=rule:rules_that_stop:score", "--overwrite")[0] == 0
        assert len(read_lines("out.jsonl")) == 6 and not PART.exists()


def test_two_runs_do_not_write_the_same_output(command: Command) -> None:
    stopped_run(command)
    held = PartFile(PART, json.loads(PART.read_text().splitlines()[0])["part_of"])
    try:
        code, _, message = command("in.jsonl", "out.jsonl", "--scorer", "a=rule:rules_that_stop:score")
    finally:
        held.close()
    assert code == 2 and "is being written by another process" in message


def test_a_full_disk_is_reported_in_one_line_and_what_is_scored_is_kept(command: Command) -> None:
    write_lines("in.jsonl", *({"prompt": f"p {i}", "responses": [{"content": "x" * 300}]} for i in range(40)))
    Path("rules_of_one_more.py").write_text("def one(prompt, response):\n    return 1\n")
    arguments = ("in.jsonl", "out.jsonl", "--scorer", "rule:rules_of_one_more:one", "--rows-at-once", "3")

    def limited() -> None:  # a file can be written so far and no further, within a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    run = start(*arguments, preexec_fn=limited)
    _, message = run.communicate(timeout=60)
    assert run.returncode == 1 and message.startswith("error: out.jsonl.part.jsonl: cannot be written (File too large)")
    assert message.count("\n") == 1 and "free some space" in message
    done = num_lines(PART) - 1
    assert 0 < done < 40 and f"{done} of 40 rows are kept" in message and PART.read_bytes().endswith(b"\n")
    code, output, _ = command(*arguments)
    assert code == 0 and f"resuming after {done} of 40 rows" in output and len(read_lines("out.jsonl")) == 40


def test_a_disk_that_fills_at_the_last_write_keeps_the_scores(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows("in.jsonl")
    Path("rules_of_two.py").write_text("def two(prompt, response):\n    return 2\n")
    arguments = ("in.jsonl", "out.jsonl", "--scorer", "rule:rules_of_two.two")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("nemo_rao.runtime.files.os.replace", full)
        code, _, message = command(*arguments)
    assert code == 1 and "No space left on device" in message and "6 of 6 rows are kept" in message
    left = {path.name for path in Path().iterdir() if path.name != "__pycache__"}
    assert left == {"in.jsonl", "rules_of_two.py", PART.name}
    code, output, _ = command(*arguments)
    assert code == 0 and "resuming after 6 of 6 rows" in output
