"""Records of a run's jobs, in ``RUN/slurm``::

recipe-*.yaml    recipes of the launched runs           job-N.log        output of the batch script of job N
job.sbatch       the last batch script                job-N/rank-M.log output of its rank M, of all starts
jobs.jsonl       one line per job
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "slurm"


@dataclass(frozen=True)
class JobRecord:
    """A submitted job.

    Attributes:
        job: ``17``, or ``17_2`` for an element of an array.
        submitted: time, in ISO format.
        log: log of its batch script.
    """

    job: str
    submitted: str
    log: str

    def rank_log(self, run: Path, rank: int) -> Path:
        return run / FOLDER / f"job-{self.job}" / f"rank-{rank}.log"


def add_record(run: Path, record: JobRecord) -> None:
    path = run / FOLDER / "jobs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read_records(run: Path) -> list[JobRecord]:
    """Read a run's jobs, oldest first."""
    path = run / FOLDER / "jobs.jsonl"
    if not path.is_file():
        return []
    return [JobRecord(**json.loads(line)) for line in path.read_text().splitlines()]


def last_words(log: Path) -> str:
    """Return the last line that the batch script itself logged; empty if there is none."""
    if not log.is_file():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[nemo-rao] ")]
    return lines[-1].removeprefix("[nemo-rao] ") if lines else ""
