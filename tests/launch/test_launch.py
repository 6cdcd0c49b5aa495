"""The launcher: a rank that fails ends the run at once, says why once, and nothing stays behind."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemo_rao.errors import RankFailure, UserError
from nemo_rao.runtime.launch import launch, started_externally

FOREVER = 600.0
AT_ONCE = 15.0  # seconds; generous to a busy machine, and far below anything that waits for a time limit

LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def no_launcher_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER_VARIABLES, *SLURM_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def rank() -> int:
    return int(os.environ["RANK"])


def note_pid(folder: Path) -> None:
    """Leave this process's number where the test looks for it."""
    (folder / f"pid-{rank()}").write_text(str(os.getpid()))


def wait_until(condition: Callable[[], bool], seconds: float = AT_ONCE) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def all_noted(folder: Path, number: int) -> bool:
    paths = list(folder.glob("pid-*"))
    return len(paths) == number and all(path.read_text() for path in paths)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and not yet waited for


def nothing_left(folder: Path) -> bool:
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    return wait_until(lambda: not any(map(is_running, pids)), seconds=5)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < AT_ONCE


# ------------------------------------------------------------------------------------------- ranks that do well


def write_place(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(rank()))
    torch.distributed.all_reduce(total)
    names = [name for name in LAUNCHER_VARIABLES if name not in ("MASTER_PORT", "MASTER_ADDR")]
    (folder / str(rank())).write_text(" ".join([str(int(total)), *(f"{name}={os.environ[name]}" for name in names)]))


def test_ranks_find_their_place_and_each_other(tmp_path: Path) -> None:
    launch(write_place, (tmp_path,), num_ranks=3)
    for number in range(3):
        assert (tmp_path / str(number)).read_text() == (
            f"3 RANK={number} LOCAL_RANK={number} WORLD_SIZE=3 LOCAL_WORLD_SIZE=3 GROUP_RANK=0"
        )


def test_a_single_rank_runs_here_and_leaves_no_trace_in_the_environment(tmp_path: Path) -> None:
    before = dict(os.environ)
    launch(note_pid, (tmp_path,), num_ranks=1)
    assert (tmp_path / "pid-0").read_text() == str(os.getpid())
    # Else the next launch of this process would take itself for a rank of somebody else's launcher.
    assert dict(os.environ) == before
    launch(note_pid, (tmp_path,), num_ranks=2)
    assert (tmp_path / "pid-1").read_text() != str(os.getpid())


# --------------------------------------------------------------------------------------------- ranks that fail


def fail_while_others_wait_in_a_barrier(folder: Path) -> None:
    note_pid(folder)
    torch.distributed.init_process_group("gloo")
    if rank() == 1:
        raise RuntimeError("the cause")
    torch.distributed.barrier()


def fail_while_others_sleep(folder: Path) -> None:
    note_pid(folder)
    if rank() == 1 and wait_until(lambda: all_noted(folder, 3)):
        raise RuntimeError("the cause")
    time.sleep(FOREVER)


@pytest.mark.parametrize("function", [fail_while_others_wait_in_a_barrier, fail_while_others_sleep])
def test_a_rank_that_raises_takes_the_others_down_and_shows_its_own_traceback_once(
    tmp_path: Path, function: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    with at_once(), pytest.raises(RankFailure) as failure:
        launch(function, (tmp_path,), num_ranks=3)
    shown = str(failure.value)
    assert shown.startswith("rank 1 failed:\nTraceback (most recent call last):")
    assert shown.rstrip().endswith("RuntimeError: the cause")
    assert shown.count("Traceback") == 1
    assert function.__name__ in shown
    assert "Traceback" not in capfd.readouterr().err  # it is the caller's to print
    assert nothing_left(tmp_path)


def ignore_the_request_to_stop(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fail_while_others_sleep(folder)


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_rao.runtime.launch._GRACE_SECONDS", 0.5)
    with at_once(), pytest.raises(RankFailure, match="rank 1 failed"):
        launch(ignore_the_request_to_stop, (tmp_path,), num_ranks=3)
    assert nothing_left(tmp_path)


def fail_at_length(folder: Path) -> None:
    note_pid(folder)
    if rank() == 1:
        raise RuntimeError("first " + "x" * 1_000_000 + " last")
    time.sleep(FOREVER)


def test_a_message_longer_than_a_pipe_holds_arrives_whole(tmp_path: Path) -> None:
    # As when a state dict misses thousands of keys.
    with at_once(), pytest.raises(RankFailure, match=re.compile("first x+ last", re.DOTALL)):
        launch(fail_at_length, (tmp_path,), num_ranks=2)
    assert nothing_left(tmp_path)


def kill_one(folder: Path, name: str) -> None:
    faulthandler.disable()  # pytest's: a stack for the terminal, of a death that is meant
    note_pid(folder)
    if rank() == 2 and wait_until(lambda: all_noted(folder, 3)):
        os.kill(os.getpid(), signal.Signals[name])
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_rank_killed_by_a_signal_is_named_with_it(tmp_path: Path, name: str) -> None:
    with at_once(), pytest.raises(RankFailure, match=f"^rank 2 was killed by {name}"):
        launch(kill_one, (tmp_path, name), num_ranks=3)
    assert nothing_left(tmp_path)


def fail_and_let_another_abort(folder: Path) -> None:
    faulthandler.disable()
    if rank() == 1:
        (folder / "failing").touch()
        raise RuntimeError("the cause")
    wait_until((folder / "failing").exists)
    time.sleep(0.1)
    os.abort()


def test_a_rank_that_aborts_because_another_failed_does_not_hide_the_cause(tmp_path: Path) -> None:
    # As NCCL's watchdog does when a peer is gone.
    with pytest.raises(RankFailure, match=r"(?s)^rank 1 failed:.*RuntimeError: the cause"):
        launch(fail_and_let_another_abort, (tmp_path,), num_ranks=2)


def refuse(folder: Path) -> None:
    note_pid(folder)
    torch.distributed.init_process_group("gloo")
    if rank() == 0:
        raise UserError("model.tensor_model_parallel_size=3: must divide 4")
    torch.distributed.barrier()


def test_a_users_error_in_a_rank_comes_back_as_one(tmp_path: Path) -> None:
    with at_once(), pytest.raises(UserError) as error:
        launch(refuse, (tmp_path,), num_ranks=2)
    assert str(error.value) == "model.tensor_model_parallel_size=3: must divide 4"
    assert nothing_left(tmp_path)


def leave(code: int) -> None:
    if rank() == 1:
        os._exit(code)
    time.sleep(FOREVER)


def test_a_rank_that_leaves_without_a_word_is_named_with_its_code() -> None:
    with at_once(), pytest.raises(RankFailure, match="rank 1 exited with code 7"):
        launch(leave, (7,), num_ranks=2)


def with_helpers(folder: Path, end: str) -> None:
    """Every rank has started a process of its own, such as a loader or a checkpoint writer; then rank 1 fails."""
    import multiprocessing

    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(FOREVER,))
    helper.start()
    (folder / f"pid-helper-{rank()}").write_text(str(helper.pid))
    note_pid(folder)
    if rank() == 1 and wait_until(lambda: all_noted(folder, 4)):
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the cause")
    time.sleep(FOREVER)


@pytest.mark.parametrize("end", ["raised", "killed"])
def test_what_ranks_have_started_ends_with_them(tmp_path: Path, end: str) -> None:
    with at_once(), pytest.raises(RankFailure):
        launch(with_helpers, (tmp_path, end), num_ranks=2)
    assert len(list(tmp_path.glob("pid-helper-*"))) == 2
    assert nothing_left(tmp_path)


PARENT = """
import os, signal, sys, time
from pathlib import Path
from nemo_rao.runtime.launch import launch

def sleep(folder):
    path = Path(folder, f"pid-{os.environ['RANK']}")
    path.with_name("." + path.name).write_text(str(os.getpid()))
    path.with_name("." + path.name).rename(path)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    launch(sleep, (sys.argv[1],), num_ranks=2)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_no_rank_outlives_its_parent(tmp_path: Path, name: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: all_noted(tmp_path, 2), seconds=60)
        assert all(is_running(int(path.read_text())) for path in tmp_path.glob("pid-*"))
        parent.send_signal(signal.Signals[name])
        parent.wait(AT_ONCE)
        assert nothing_left(tmp_path)
    finally:
        parent.kill()
        parent.wait()


# ------------------------------------------------------------------------------------ ranks started by others


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
IN_ALLOCATION = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}
SRUN_STEP = {**IN_ALLOCATION, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"}
INTERACTIVE_STEP = {**IN_ALLOCATION, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (TORCHRUN, "torchrun"),
        (SRUN_STEP, "slurm"),
        ({**SRUN_STEP, **TORCHRUN}, "torchrun"),
        (IN_ALLOCATION, None),
        (INTERACTIVE_STEP, None),
        ({"WORLD_SIZE": "2"}, None),
    ],
    ids=["plain", "torchrun", "srun", "torchrun under srun", "sbatch shell", "salloc shell", "stray variable"],
)
def test_launchers_are_distinguished_from_shells(environ: dict[str, str], expected: str | None) -> None:
    assert started_externally(environ) == expected


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN_STEP], ids=["torchrun", "srun"])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_rank_started_from_outside_runs_the_function_itself(
    environ: dict[str, str], num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    before, ran_in = dict(os.environ), []
    launch(lambda: ran_in.append((os.getpid(), dict(os.environ))), (), num_ranks=8, num_nodes=num_nodes)
    assert ran_in == [(os.getpid(), before)]


@pytest.mark.parametrize(
    "environ", [{}, IN_ALLOCATION, INTERACTIVE_STEP], ids=["plain", "sbatch shell", "salloc shell"]
)
def test_several_nodes_without_a_launcher_are_refused(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"trainer.num_nodes is 2.*srun.*torchrun"):
        launch(pytest.fail, ("a rank was started",), num_ranks=2, num_nodes=2)
