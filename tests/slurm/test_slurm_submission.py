"""Jobs on a real SLURM whose tasks train nothing: how they are started, ended, and queued again.

The tasks run :data:`TASK` in place of ``python -m nemo_rao``: it notes what it was started with, and then does as a
rank does that has not come to its first step (:mod:`nemo_rao.runtime.job`), without importing NeMo.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..train.runs import TINY
from .lab import Lab
from .test_slurm_batch_script import STRANGE

pytestmark = pytest.mark.timeout(240)

TASK = """\
#!{python}
import json, os, sys, time
from nemo_rao.runtime.job import job_folder, supervised
from nemo_rao.errors import UserError

with supervised():
    noted = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    path = job_folder() / f"noted-{{os.environ.get('SLURM_RESTART_COUNT', '0')}}-{{os.environ['SLURM_PROCID']}}"
    path.with_suffix(".tmp").write_text(json.dumps(noted))
    path.with_suffix(".tmp").rename(path)
    print("started", flush=True)
    if os.environ.get("DO") == "wait" and os.environ.get("SLURM_RESTART_COUNT", "0") in os.environ["WHILE"]:
        time.sleep(600)
    if os.environ.get("DO") == "fail":
        if os.environ["SLURM_PROCID"] == "3":
            raise RuntimeError("the cause")
        time.sleep(600)
    if os.environ.get("DO") == "refuse":
        raise UserError("data.train_path: cannot be used")
"""


class Submitted:
    """A submission that is not followed."""

    def __init__(self, lab: Lab, folder: Path, data: tuple[str, ...], *arguments: str, name: str = "run") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        task = folder / "task"
        task.write_text(TASK.format(python=sys.executable))
        task.chmod(0o755)
        self.lab, self.folder, self.run = lab, folder, folder / "runs" / name
        given = (
            *("cluster=slurm", "cluster.partition=batch", "cluster.gpus_per_node=2", "cluster.exclusive=false"),
            *(
                f"cluster.python={task}",
                "cluster.poll_seconds=0.5",
                "cluster.save_seconds=30",
                f"exp_manager.name='{name}'",
            ),
            *("trainer.devices=2", "trainer.num_nodes=2", "model.tensor_model_parallel_size=2"),
        )
        self.command = [sys.executable, "-m", "nemo_rao", "launch", *given, *TINY, *data, *arguments]
        self.answer = self.launch("--detach")
        assert self.answer.returncode == 0, self.answer.stderr
        found = re.search(r"submitted job (\d+)", self.answer.stdout)
        assert found, self.answer.stdout
        self.job = found[1]

    def launch(self, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *more],
            cwd=self.folder,
            env=self.lab.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def log(self) -> str:
        path = self.run / f"slurm/job-{self.job}.log"
        return path.read_text() if path.exists() else ""

    def noted(self, attempt: int, rank: int = 0) -> dict[str, Any]:
        path = self.run / f"slurm/job-{self.job}/noted-{attempt - 1}-{rank}"
        until(path.exists, lambda: f"no {path}:\n{self.log()}")
        return json.loads(path.read_text())

    def shown(self) -> str:
        return self.lab.call("scontrol", "show", "job", "--oneliner", self.job)

    def until_state(self, state: str) -> None:
        until(lambda: f"JobState={state} " in self.shown(), lambda: f"not {state}: {self.shown()}\n{self.log()}")


def until(condition: Callable[[], bool], message: Callable[[], str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message()
        time.sleep(0.1)


def test_what_users_give_reaches_tasks_as_it_is_and_ranks_find_each_other(
    lab: Lab, data: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "it's $(touch pwned) #1"
    strange = '"' + STRANGE.replace('"', '\\"') + '"'  # as Hydra reads text
    job = Submitted(lab, folder, data, f"cluster.environment={{NAME: {strange}, NCCL_DEBUG: INFO}}")
    job.until_state("COMPLETED")
    assert "finished" in job.log()
    for rank in range(4):
        noted = job.noted(1, rank)
        assert noted["folder"] == str(folder)
        (written,) = (job.run / "slurm").glob("recipe-*.yaml")
        recipe = ["--config-dir", str(job.run / "slurm"), "--config-name", written.stem]
        assert noted["arguments"] == ["-m", "nemo_rao", "train", *recipe]
        found = noted["environment"]
        assert (found["NAME"], found["NCCL_DEBUG"], found["MASTER_ADDR"]) == (STRANGE, "INFO", "node1")
        assert (found["SLURM_PROCID"], found["SLURM_LOCALID"]) == (str(rank), str(rank % 2))
        assert found["SLURM_STEP_NUM_TASKS"] == "4" and 20000 <= int(found["MASTER_PORT"]) < 30000
        assert (job.run / f"slurm/job-{job.job}/rank-{rank}.log").read_text() == "started\n"
    assert not list(tmp_path.rglob("pwned"))


def test_a_sweep_is_a_job_array(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    job = Submitted(lab, tmp_path, data, "-m", "model.rao.beta=0.1,0.2,0.3", "cluster.array_limit=2", name="sweep")
    runs = sorted((tmp_path / "runs").glob("sweep-beta=*"))
    assert [run.name for run in runs] == ["sweep-beta=0.1", "sweep-beta=0.2", "sweep-beta=0.3"]
    assert "ArrayTaskThrottle=2" in job.shown()
    for element, run in enumerate(runs):
        path = run / f"slurm/job-{job.job}_{element}/noted-0-0"
        until(path.exists, lambda path=path: f"no {path}")
        assert json.loads(path.read_text())["arguments"][4] == str(run / "slurm")
        (recipe,) = (run / "slurm").glob("recipe-*.yaml")
        assert f"beta: 0.{element + 1}" in recipe.read_text()
    listed = subprocess.run(
        [sys.executable, "-m", "nemo_rao", "status", *map(str, runs)],
        env=lab.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert [listed.stdout.count(f"{job.job}_{element} ") for element in range(3)] == [1, 1, 1], listed


def test_a_chain_waits_and_a_run_is_not_launched_twice(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    waiting = ("cluster.environment={DO: wait, WHILE: '0'}",)
    first = Submitted(lab, tmp_path, data, *waiting, name="first")
    # It starts from what the first is to make: that there is nothing yet is no mistake.
    start = f"model.restore_from_path={first.run}"
    second = Submitted(lab, tmp_path, data, start, "--dependency", str(first.run), name="second")
    assert re.search(rf"Dependency=afterok:{first.job}\b", second.shown())
    third = Submitted(lab, tmp_path, data, "--dependency", f"afterany:{second.job}", name="third")
    assert "JobState=PENDING" in third.shown() and "Reason=Dependency" in third.shown()

    first.noted(1)
    again = first.launch()
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert f"job {first.job} RUNNING" in again.stderr and f"scancel {first.job}" in again.stderr

    lab.call("scancel", first.job)  # a signal, but not one to come back from
    first.until_state("CANCELLED")
    assert "requeued\n" not in first.log()
    until(lambda: "JobState=CANCELLED" in second.shown(), lambda: second.shown())  # not left waiting for ever
    third.until_state("COMPLETED")


def test_a_job_stopped_before_its_first_step_restarts_up_to_the_limit(
    lab: Lab, data: tuple[str, ...], tmp_path: Path
) -> None:
    job = Submitted(lab, tmp_path, data, "cluster.environment={DO: wait, WHILE: '01'}", "cluster.max_restarts=1")
    job.noted(1, 3)
    lab.call("scancel", "--batch", "--signal=USR1", job.job)
    job.noted(2, 3)
    assert "stopped before the first step of this attempt" in job.log()
    lab.call("scancel", "--batch", "--signal=USR1", job.job)
    job.until_state("FAILED")
    assert "not requeued: restarted 1 times (cluster.max_restarts)" in job.log()


def test_a_job_that_loses_a_node_comes_back(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    job = Submitted(lab, tmp_path, data, "cluster.environment={DO: wait, WHILE: '0'}")
    job.noted(1, 3)
    lab.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.until_state("PENDING")
    lab.call("scontrol", "update", "nodename=node2", "state=resume", check=False)  # unless it has come back by itself
    job.until_state("COMPLETED")
    assert "attempt 2" in job.log()


def test_ctrl_c_ends_the_following_and_not_the_job(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    job = Submitted(lab, tmp_path, data, "cluster.environment={DO: wait, WHILE: '0'}")
    job.noted(1, 3)
    said = tmp_path / "said.txt"
    with said.open("w") as out:
        following = subprocess.Popen(
            [sys.executable, "-m", "nemo_rao", "status", str(job.run), "--follow", "--poll-seconds", "0.2"],
            env=lab.environment,
            stdout=out,
            stderr=out,
            # Ignored in what runs in the background, which a test may.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    until(lambda: f"job {job.job} RUNNING" in said.read_text(), said.read_text)
    following.send_signal(signal.SIGINT)
    assert following.wait(30) == 130
    assert f"job {job.job} goes on" in said.read_text() and f"scancel {job.job}" in said.read_text()
    assert "JobState=RUNNING" in job.shown()
    lab.call("scancel", job.job)
    job.until_state("CANCELLED")


def test_the_first_failure_of_a_rank_is_in_the_log_and_ends_the_job(
    lab: Lab, data: tuple[str, ...], tmp_path: Path
) -> None:
    job = Submitted(lab, tmp_path, data, "cluster.environment={DO: fail}")
    job.until_state("FAILED")
    assert re.search(
        r"rank 3 on node2 failed:\nTraceback \(most recent call last\):\n(.*\n)+?RuntimeError: the cause", job.log()
    )
    assert job.log().count("Traceback") == 1
    refused = Submitted(lab, tmp_path, data, "cluster.environment={DO: refuse}", name="refused")
    refused.until_state("FAILED")
    assert re.search(r"rank \d on node\d: error: data.train_path: cannot be used", refused.log())
    assert "Traceback" not in refused.log()


def test_what_slurm_refuses_is_reported_in_its_words(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    job = Submitted(lab, tmp_path, data)
    job.until_state("COMPLETED")
    refused = job.launch("cluster.partition=nope", "exp_manager.name=other")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "sbatch rejects the job: " in refused.stderr and "partition" in refused.stderr
    assert not (tmp_path / "runs/other").exists()
