"""Runs on a real SLURM: a job may end without changing what a run computes, and what ends a run is reported at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ..train.runs import TINY, in_fork, parallel, steps
from .lab import Lab

pytestmark = pytest.mark.timeout(900)  # each rank of a job imports NeMo itself, and there may be more ranks than cores
SOON = 30.0  # seconds from a rank's end to that of its job
AT_LAST = 300.0
NUM_STEPS = 24
LAUNCH = (sys.executable, "-m", "nemo_rao", "launch")

CLUSTER = """\
partition: {partition}
nodes: 2
gpus_per_node: 2
time: 0:30:00
save_seconds: 30
hang_minutes: 0.5
poll_seconds: 0.5
environment: {{OMP_NUM_THREADS: 1}}
"""


class Launched:
    """A run that was launched, and followed by a process of its own."""

    def __init__(
        self, lab: Lab, folder: Path, *arguments: str, cluster: str = CLUSTER.format(partition="batch")
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lab.yaml").write_text(cluster)
        self.lab, self.run, self.said = lab, folder / "runs/run", folder / "said.txt"
        command = [*LAUNCH, "--config-name", "gpt_rao", "cluster=lab.yaml", "exp_manager.name=run", *TINY, *arguments]
        with self.said.open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=lab.environment, stdout=out, stderr=out)
        self.until(lambda: (self.run / "slurm/jobs.jsonl").exists(), "submitted")
        self.job = json.loads((self.run / "slurm/jobs.jsonl").read_text().splitlines()[-1])["job"]

    @property
    def log(self) -> str:
        path = self.run / f"slurm/job-{self.job}.log"
        return path.read_text() if path.exists() else ""

    def rank_log(self, rank: int) -> str:
        return (self.run / f"slurm/job-{self.job}/rank-{rank}.log").read_text()

    def until(self, condition: Callable[[], bool], what: str, seconds: float = AT_LAST) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.process.poll() is not None and not condition()):
                logs = "\n".join(path.read_text()[-3000:] for path in self.run.glob("slurm/**/*.log"))
                raise AssertionError(f"not {what}:\n{self.said.read_text()}\n{logs}")
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        path = self.run / "metrics.jsonl"
        self.until(lambda: path.exists() and path.read_text().count('"loss"') >= step, f"at step {step}")

    def pid_of(self, rank: int) -> int:
        """The process of a rank, which SLURM has started."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                variables = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            folder = f"NEMO_RAO_JOB_FOLDER={self.run}/slurm/job-{self.job}".encode()
            if words[1:4] == [b"-m", b"nemo_rao", b"train"] and {f"SLURM_PROCID={rank}".encode(), folder} <= {
                *variables
            }:
                return int(process.name)
        raise AssertionError(f"rank {rank} of job {self.job} does not run")

    def state(self) -> str:
        return self.lab.call("scontrol", "show", "job", "--oneliner", self.job)

    def held_at(self, step: int) -> int:
        """Waits for a step, then stops a rank, so that no further one ends before :func:`resume`; its process."""
        self.until_step(step)
        pid = self.pid_of(1)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def end(self, seconds: float = AT_LAST) -> int:
        return self.process.wait(seconds)


def status(lab: Lab, run: Path) -> str:
    command = [sys.executable, "-m", "nemo_rao", "status", str(run)]
    done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch_here(folder: Path, *arguments: str) -> None:
    """The same launch without a scheduler, in a process of its own."""
    in_fork(_launch_here, folder, arguments)


def _launch_here(folder: Path, arguments: Sequence[str]) -> None:
    from nemo_rao.cli import main

    os.chdir(folder)
    assert main(["launch", "--config-name", "gpt_rao", "cluster=local", "exp_manager.name=run", *TINY, *arguments]) == 0


def test_a_run_survives_its_time_limit_and_pre_emption_with_the_numbers_of_an_undisturbed_one(
    lab: Lab, data: tuple[str, ...], tmp_path: Path
) -> None:
    of_run = (*data, f"trainer.max_steps={NUM_STEPS}", "model.arch.hidden_dropout=0.1")
    split = ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")
    run = Launched(
        *(lab, tmp_path / "job", *of_run, *split, "trainer.devices=2", "trainer.num_nodes=2"),
        cluster=CLUSTER.format(partition="spare").replace("hang_minutes: 0.5", "hang_minutes: 5"),
    )
    # The time limit. It is moved: SLURM's own unit is a minute, and it looks for signals to send every half.
    pid = run.held_at(3)
    lab.call("scontrol", "update", f"JobId={run.job}", "EndTime=now+31")
    run.until(lambda: "a signal" in run.log, "warned before its time limit")
    os.kill(pid, signal.SIGCONT)
    run.until(lambda: "requeued" in run.log, "requeued")
    run.until(lambda: "JobState=PENDING" in run.state(), "in the queue")
    lab.call("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    stopped = [int(step) for step in re.findall(r"saved after step (\d+)", run.log)]
    assert len(stopped) == 1 and 3 <= stopped[0] < NUM_STEPS
    assert len(steps(run.run)) == stopped[0]

    # Pre-emption: a job that takes both nodes, from a partition above.
    pid = run.held_at(stopped[0] + 3)
    assert re.search(rf"job +{run.job} RUNNING attempt 2 on node\[1-2\]", status(lab, run.run))
    both_nodes = ("-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null")
    urgent = lab.call("sbatch", "--parsable", *both_nodes, "--wrap", "sleep 1").strip()
    run.until(lambda: "PreemptTime=None" not in run.state(), "pre-empted")
    os.kill(pid, signal.SIGCONT)
    run.until(lambda: run.log.count("requeued") == 2, "requeued")
    run.until(lambda: "attempt 3" in run.log, "started a third time")
    assert "JobState=COMPLETED" in lab.call("scontrol", "show", "job", urgent)

    assert run.end() == 0, run.said.read_text()
    assert run.log.count("requeued") == 2 and "finished" in run.log
    in_order = [run.said.read_text().find(f"job {run.job} RUNNING attempt {attempt}") for attempt in (1, 2, 3)]
    assert -1 not in in_order and in_order == sorted(in_order)
    printed = status(lab, run.run)
    for part in (f"{run.job} COMPLETED", f"step        {NUM_STEPS} of {NUM_STEPS}", "loss ", f"step={NUM_STEPS}"):
        assert part in printed, printed

    (tmp_path / "here").mkdir()
    launch_here(tmp_path / "here", *of_run, *parallel(2, 2, 1))
    assert steps(run.run) == steps(tmp_path / "here/runs/run")


def test_a_hang_and_a_killed_rank_end_their_jobs(lab: Lab, data: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*data, "trainer.max_steps=100000", "trainer.max_epochs=null", "trainer.num_nodes=2")
    arguments = (*arguments, "model.pipeline_model_parallel_size=2", "model.global_batch_size=8")
    killed = Launched(lab, tmp_path / "killed", *arguments)
    hanging = Launched(lab, tmp_path / "hanging", *arguments)
    hanging.held_at(2)
    killed.until_step(2)

    os.kill(killed.pid_of(1), signal.SIGSEGV)
    start = time.monotonic()
    killed.until(lambda: "JobState=FAILED" in killed.state(), "ended", SOON)
    assert time.monotonic() - start < SOON
    assert killed.end() == 1
    assert "Fatal Python error: Segmentation fault" in killed.rank_log(1)
    for said in (killed.log, killed.said.read_text()):  # in the job's log, and on the terminal of whoever follows
        assert "task 1: Segmentation fault" in said and "Fatal Python error: Segmentation fault" in said
        assert "in optimizer_step" in said or 'File "' in said

    assert hanging.end() == 1
    assert "JobState=FAILED" in hanging.state()
    assert re.search(r"rank \d on node\d hangs: no progress for \d+ seconds", hanging.log)
    assert "Thread" in hanging.rank_log(0)
