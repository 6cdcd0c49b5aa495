"""A rank of a SLURM job that is asked to stop leaves what the batch script needs to tell a stop from a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rao.runtime.job import FAILURE, FOLDER, STOPPED

RANK = """
import os, signal, sys
from nemo_rao.runtime.job import REQUEST, supervised

with supervised():
    REQUEST.heard_at_steps, REQUEST.stepped = True, sys.argv[2] == "later"
    if sys.argv[1] == "asked":
        os.kill(os.getpid(), signal.SIGUSR1)
    raise RuntimeError("Connection closed by peer")
"""


@pytest.mark.parametrize(
    ("asked", "step", "code", "left"),
    [
        ("asked", "first", 0, STOPPED),  # another rank had not begun the step yet, and has left
        ("asked", "later", 1, FAILURE),  # all ranks hear at the end of a step
        ("not asked", "first", 1, FAILURE),
    ],
)
def test_a_failure_within_the_first_step_is_a_stop_where_one_was_asked_for(
    asked: str, step: str, code: int, left: str, tmp_path: Path
) -> None:
    environment = {**os.environ, FOLDER: str(tmp_path), "SLURM_PROCID": "0"}
    rank = subprocess.run(
        [sys.executable, "-c", RANK, asked, step], env=environment, capture_output=True, text=True, timeout=60
    )
    assert rank.returncode == code, rank.stderr
    assert "Connection closed by peer" in rank.stderr
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_rank_that_is_asked_before_the_first_step_leaves_at_once(tmp_path: Path) -> None:
    waits = "\n".join(
        [
            "import time",
            "from nemo_rao.runtime.job import supervised",
            "with supervised():",
            "    print('up', flush=True)",
            # Short ones: a signal right before the system call does not interrupt it.
            "    for _ in range(600):",
            "        time.sleep(0.1)",
        ]
    )
    environment = {**os.environ, FOLDER: str(tmp_path), "SLURM_PROCID": "0"}
    with subprocess.Popen([sys.executable, "-c", waits], env=environment, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "up\n"
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(timeout=30) == 0
    assert "before the first step" in (tmp_path / STOPPED).read_text()
