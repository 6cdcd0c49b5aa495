"""Progress on a terminal and in a log file: what is written there, character by character."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.runtime import progress
from nemo_rao.runtime.progress import Progress, duration


class Clock:
    """A clock that is set by hand, in seconds."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return made


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What was written to a stderr that is no terminal."""
    return lambda: capsys.readouterr().err


def test_a_log_file_gets_a_line_every_20_seconds_and_one_at_the_end(clock: Clock, written: Callable[[], str]) -> None:
    with Progress("reference log-probs", unit="prompt") as shown:
        for second in range(1, 61):
            clock.now = float(second)
            shown.update(2 * second, 120)
    text = written()
    assert text.splitlines() == [
        "reference log-probs: 40 of 120 prompts, 2 prompts/s, 40 s left",
        "reference log-probs: 80 of 120 prompts, 2 prompts/s, 20 s left",
        "reference log-probs: 120 of 120 prompts in 1 min, 2 prompts/s",
    ]
    assert "\r" not in text and "\x1b" not in text


def test_steps_are_shown_with_their_metrics_and_slow_ones_by_the_seconds_each_takes(
    clock: Clock, written: Callable[[], str]
) -> None:
    with Progress("rao", unit="step", total=1200, done=200) as shown:
        for step in (201, 202):
            clock.now += 30.0
            shown.update(step, metrics={"loss": 0.123456, "tokens_per_second": 25634.5})
    assert written().splitlines() == [
        "rao: 201 of 1,200 steps, 30 s/step, 8 h 19 min left, loss 0.1235, tokens_per_second 2.563e+04",
        "rao: 202 of 1,200 steps, 30 s/step, 8 h 19 min left, loss 0.1235, tokens_per_second 2.563e+04",
        "rao: 202 of 1,200 steps in 1 min, 30 s/step, loss 0.1235, tokens_per_second 2.563e+04",
    ]


def test_where_the_total_is_unknown_no_end_is_foretold(clock: Clock, written: Callable[[], str]) -> None:
    with Progress("training data", unit="row", stays=False) as shown:
        clock.now = 25.0
        shown.update(50_000)
        clock.now = 30.0
        shown.update(60_000)
    assert written() == "training data: 50,000 rows, 2,000 rows/s\n"


@pytest.mark.parametrize("how", ["hidden", "disabled", "within other work", "ended by an error", "found done"])
def test_nothing_is_written_where_nothing_should_be(
    how: str, clock: Clock, written: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "disabled":
        monkeypatch.setenv("TQDM_DISABLE", "1")
    try:
        with Progress("work", unit="row", total=2, shown=how != "hidden", position=int("within" in how)) as shown:
            if how != "found done":
                clock.now = 0.0 if how == "ended by an error" else 100.0
                shown.advance(1)
            if how == "ended by an error":
                raise ValueError
    except ValueError:
        pass
    assert written() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (110, "1 min 50 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


WORK = """
from nemo_rao.runtime.progress import Progress
with Progress("work", unit="row", total=3) as shown:
    for _ in range(3):
        shown.advance(1)
"""


def test_a_pipe_gets_whole_lines_and_a_terminal_a_bar() -> None:
    command = [sys.executable, "-c", WORK]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    to_pipe = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, env=environment, timeout=60).stderr
    assert to_pipe.startswith("work: 3 of 3 rows in 0 s, ") and to_pipe.count("\n") == 1 and "\r" not in to_pipe

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    subprocess.run(command, stderr=theirs, check=True, env=environment, timeout=60)
    os.close(theirs)
    to_terminal = b""
    try:
        while part := os.read(ours, 65536):
            to_terminal += part
    except OSError:  # Linux: all of it is read
        pass
    assert b"\r" in to_terminal and b"3/3" in to_terminal


def test_every_part_of_the_package_shows_progress_by_this_module() -> None:
    package = Path(progress.__file__).parent
    others = [
        str(file.relative_to(package))
        for file in sorted(package.rglob("*.py"))
        if any(word in file.read_text() for word in ("import tqdm", "rich.progress")) and file.name != "progress.py"
    ]
    assert others == [] and "rich.progress" not in (package.parent / "generation" / "progress.py").read_text()
