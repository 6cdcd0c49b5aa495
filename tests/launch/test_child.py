"""A child process: how it ends is reported in one way, and what it has started ends with it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from nemo_rao.errors import RankFailure, UserError
from nemo_rao.runtime.child import Child, end

from .test_launch import FOREVER, at_once, is_running, wait_until


def act(what: str) -> str:
    faulthandler.disable()  # pytest's would print a stack
    if what == "refuse":
        raise UserError("a=1: must be 2")
    if what == "fail":
        raise RankFailure("said once")
    if what == "crash":
        raise KeyError("gone")
    if what == "leave":
        os._exit(7)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return what * 100_000  # more than a pipe holds


@pytest.mark.parametrize(
    ("what", "code", "error", "message"),
    [
        ("refuse", 2, UserError, r"^a=1: must be 2$"),
        ("fail", 1, RankFailure, r"^said once$"),
        ("crash", 1, RankFailure, r"(?s)^Traceback.*KeyError: 'gone'"),
        ("leave", 7, RankFailure, r"^a test exited with code 7$"),
        ("die", -9, RankFailure, r"^a test was killed by SIGKILL \(out of memory\?\)$"),
    ],
)
def test_each_failure_has_its_exit_code_and_its_message(
    what: str, code: int, error: type[Exception], message: str
) -> None:
    child = Child(act, (what,), name="a test")
    with at_once(), pytest.raises(error, match=message):
        child.value_of(child.wait())
    assert child.exit_code == code


def test_what_the_function_returns_is_returned() -> None:
    child = Child(act, ("done",), name="a test")
    with at_once():
        assert child.value_of(child.wait()) == "done" * 100_000
    assert child.exit_code == 0


def start_helper_and_sleep(folder: Path, ignore: str) -> None:
    if ignore:
        signal.signal(signal.Signals[ignore], signal.SIG_IGN)
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(FOREVER,))
    helper.start()
    try:
        (folder / "pids.new").write_text(f"{os.getpid()} {helper.pid}")
        (folder / "pids.new").rename(folder / "pids")
        time.sleep(FOREVER)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        raise


@pytest.mark.parametrize(("interrupt", "ignore"), [(False, ""), (False, "SIGTERM"), (True, ""), (True, "SIGINT")])
def test_ending_a_child_ends_what_it_has_started(tmp_path: Path, interrupt: bool, ignore: str) -> None:
    child = Child(start_helper_and_sleep, (tmp_path, ignore), name="a test", interruptible=True)
    assert wait_until((tmp_path / "pids").exists)
    with at_once():
        end([child], grace=0.5 if ignore else 5.0, interrupt=interrupt)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_until(lambda: not any(map(is_running, pids)), seconds=5)
    assert (tmp_path / "interrupted").exists() == (interrupt and not ignore)
    assert child.killed_by == ("SIGKILL" if ignore else None if interrupt else "SIGTERM")
