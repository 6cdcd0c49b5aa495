"""Follow jobs until they end: changes of their state, and the output of the batch script and of rank 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from nemo_rao.cluster.records import JobRecord
from nemo_rao.cluster.slurm import JobState, job_states
from nemo_rao.errors import UserError

_PATIENCE = 5  # consecutive failed queries; a restarting controller recovers


class Tail:
    """Reads new complete lines of a file that may not exist yet, or grow while it is read."""

    def __init__(self, path: Path, *, from_end: bool) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def lines(self, *, rest: bool = False) -> list[str]:
        """Return the new lines; with ``rest``, also an unterminated last line."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            read = file.read()
        self._offset += len(read)
        *whole, self._rest = (self._rest + read).replace(b"\r", b"\n").split(b"\n")
        if rest and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace") for line in whole if line.strip()]


def follow(run: Path | None, records: Sequence[JobRecord], *, poll_seconds: float, from_end: bool = False) -> int:
    """Print progress until all jobs have ended, or Ctrl-C.

    Args:
        run: directory of the run whose logs are shown; ``None``: only states, as for a sweep.
        records: jobs of one submission.
        poll_seconds: interval between queries.
        from_end: show only new lines of the logs.

    Returns:
        the exit code: 0 if all jobs succeeded, 1 if one failed, 130 after Ctrl-C, which ends no job.
    """
    last: dict[str, JobState] = {}
    tails = []
    if run is not None:
        tails = [
            Tail(Path(records[-1].log), from_end=from_end),
            Tail(records[-1].rank_log(run, 0), from_end=from_end),
        ]
    try:
        ended = _watch(records, last, tails, poll_seconds)
    except KeyboardInterrupt:
        jobs = records[0].job.partition("_")[0] if records else ""
        where = f"nemo-rao status {run} --follow" if run is not None else f"squeue --job {jobs}"
        print(
            f"\nstopped following; job {jobs} continues. To see its state: {where}; to cancel it: scancel {jobs}",
            flush=True,
        )
        return 130
    return 0 if ended else 1


def _watch(records: Sequence[JobRecord], last: dict[str, JobState], tails: Sequence[Tail], poll_seconds: float) -> bool:
    """Watch the jobs until they end. Return whether all have succeeded."""
    failures = looks_at_end = 0
    while True:
        try:
            states = {record.job: _state_of(record) for record in records}
            failures = 0
        except UserError:
            failures += 1
            if failures == _PATIENCE:
                raise
            time.sleep(poll_seconds)
            continue
        over = all(state is None or not state.is_active for state in states.values())
        for tail in tails:
            for line in tail.lines(rest=over):
                print(line, flush=True)
        for job, state in states.items():
            if state is not None and (job not in last or _differs(state, last[job])):
                print(state, flush=True)
                last[job] = state
        # A job that is being requeued passes through states in which it seems to have ended.
        looks_at_end = looks_at_end + 1 if over else 0
        if looks_at_end == 2:
            return all(state is not None and state.state == "COMPLETED" for state in states.values())
        time.sleep(poll_seconds)


def _state_of(record: JobRecord) -> JobState | None:
    found = job_states(record.job)
    return found[0] if found else None


def _differs(new: JobState, old: JobState) -> bool:
    return (new.state, new.attempts, new.reason) != (old.state, old.attempts, old.reason)
