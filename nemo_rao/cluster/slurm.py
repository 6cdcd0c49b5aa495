"""SLURM's commands with typed results, called with lists of arguments and never through a shell."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from nemo_rao.errors import UserError

ACTIVE = frozenset(
    ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED", "RESIZING", "SIGNALING")
)


@dataclass(frozen=True)
class JobState:
    """State of a job, or of one element of a job array.

    Attributes:
        job: ``17``, or ``17_2``.
        state: SLURM's word, such as RUNNING.
        attempts: starts so far, including the current one; 0 before the first.
        nodes: SLURM's list, such as ``node[1-2]``; empty if it has none yet.
        elapsed, limit: elapsed time and time limit of this attempt, in SLURM's format.
        reason: why it is waiting, or has ended.
    """

    job: str
    state: str
    attempts: int
    nodes: str
    elapsed: str
    limit: str
    reason: str

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    def __str__(self) -> str:
        parts = [f"job {self.job}", self.state]
        if self.state == "PENDING":
            parts += [f"({self.reason})"] + ([f"for attempt {self.attempts + 1}"] if self.attempts else [])
            return " ".join(parts)
        parts += [f"attempt {self.attempts}"] if self.attempts else []
        parts += [f"on {self.nodes}"] if self.nodes else []
        if self.state == "RUNNING":
            parts += [f"for {self.elapsed} of {self.limit}"]
        elif self.reason not in ("", "None"):
            parts += [f"({self.reason})"]
        return " ".join(parts)


def call(*command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command. The caller checks its exit code.

    Raises:
        UserError: the command does not exist on this machine, or does not respond.
    """
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: no such command on this machine. Launch from a login node of the cluster, or with "
            "cluster=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]}: SLURM's controller has not responded for 120 seconds. Try again later."
        ) from None


def check_script(script: str) -> None:
    """Ask SLURM whether it would accept this script; nothing is submitted.

    Raises:
        UserError: it would not, with SLURM's message.
    """
    answer = call("sbatch", "--test-only", given=script)
    if answer.returncode != 0:
        raise UserError(f"sbatch rejects the job: {_message(answer.stderr)}")


def submit(script: str) -> str:
    """Submit a job and return its number.

    Raises:
        UserError: SLURM rejects it.
    """
    answer = call("sbatch", "--parsable", given=script)
    if answer.returncode != 0:
        raise UserError(f"sbatch rejects the job: {_message(answer.stderr)}")
    return answer.stdout.strip().partition(";")[0]


def job_states(job: str) -> list[JobState]:
    """Return the state of a job, or of all elements of a job array; empty if SLURM no longer knows it."""
    answer = call("scontrol", "show", "job", "--oneliner", job)
    if answer.returncode == 0:
        return [state for line in answer.stdout.splitlines() for state in _of_line(line)]
    if "invalid job id" not in answer.stderr.lower():
        raise UserError(f"scontrol: {_message(answer.stderr)}")
    # The controller soon forgets jobs; the accounting database, if there is one, keeps them.
    try:
        answer = call(
            *("sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2"),
            "--format=JobID,State,NodeList,Elapsed,Timelimit,ExitCode",
        )
    except UserError:
        return []
    rows = [line.split("|") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return [
        JobState(row[0], row[1].partition(" ")[0], 0, row[2], row[3], row[4], f"exit code {row[5]}")
        for row in rows
        if len(row) == 6
    ]


def _of_line(line: str) -> list[JobState]:
    """Parse a line of ``scontrol show job``: NAME=VALUE separated by blanks, which names of our jobs do not contain."""

    def value(name: str, default: str = "") -> str:
        found = re.search(rf"(?:^| ){name}=(\S*)", line)
        return found[1] if found and found[1] != "(null)" else default

    job, state, restarts = value("JobId"), value("JobState"), int(value("Restarts", "0"))
    if array := value("ArrayJobId"):
        job = f"{array}_{value('ArrayTaskId')}"
    if not state:
        return []
    started = state not in ("PENDING", "CONFIGURING") and value("NodeList") != ""
    attempts = restarts + 1 if started else restarts
    return [JobState(job, state, attempts, value("NodeList"), value("RunTime"), value("TimeLimit"), value("Reason"))]


def _message(text: str) -> str:
    return " ".join(text.replace("sbatch: error: ", "").replace("allocation failure: ", "").split())
