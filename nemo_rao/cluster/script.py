"""The batch script of a job, from a cluster's keys and the runs that the job trains.

One attempt of a job, until it ends or is requeued::

    srun, one task per GPU: nemo-rao train --config-dir RUN/slurm --config-name recipe-DIGEST
        |  USR1 before the time limit or at pre-emption -> to the tasks, which save and write RUN/slurm/job-N/stopped
        v
    stopped            scontrol requeue: the next attempt resumes from the checkpoint
    succeeded          the job is done
    failed             the record of the first rank that failed, then the job ends with srun's exit code

User input is quoted for the shell (:func:`shlex.quote`) and escaped for sbatch (:func:`directive`). Keys of the recipe
do not appear: they are in the file recipe-DIGEST.yaml.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_rao.cluster.config import ClusterConfig, Mount
from nemo_rao.errors import UserError
from nemo_rao.runtime.job import FAILURE, FOLDER, HANG_SECONDS, STOPPED

LATE_SECONDS = 20  # before the time limit; a job whose ranks have not saved by then is requeued anyway

# Environment of tasks, unless the cluster's keys override it.
ENVIRONMENT: Mapping[str, str] = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank whose peer is lost exits instead of waiting
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron: communication must start before the computation that it overlaps
    "PYTHONFAULTHANDLER": "1",  # a rank that crashes prints its stack
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_MININTERVAL": "30",  # seconds between lines of other packages' progress bars in a log
}
# Set by a launcher around nemo-rao launch.
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_OURS = frozenset(
    (
        *("job-name", "partition", "account", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres"),
        *("cpus-per-task", "time", "exclusive", "signal", "requeue", "no-requeue", "open-mode", "output", "error"),
        *("chdir", "array", "dependency", "kill-on-invalid-dep", "wrap", "parsable", "test-only"),
    )
)


@dataclass(frozen=True)
class RunFolder:
    """The directory of a run, ``exp_dir/name``: its path on this machine, and its path for the tasks."""

    outside: Path
    inside: Path


@dataclass(frozen=True)
class Job:
    """The content of a batch script.

    Attributes:
        name: any text.
        runs: one run, or those of a sweep, each an element of a job array.
        recipe: name of each run's recipe in its directory, ``RUN/slurm/NAME.yaml``.
        num_nodes, ranks_per_node: size of each run.
        working_dir: working directory of the tasks.
        log: file of the batch script's output; ``%j`` is the job, ``%A_%a`` the array and the element.
        dependency: in sbatch's syntax, or ``None``.
        python: an interpreter with nemo_rao, as a task sees it.
        mounts: mounts of the container, see :func:`nemo_rao.cluster.config.mounts`.
    """

    name: str
    runs: Sequence[RunFolder]
    recipe: str
    num_nodes: int
    ranks_per_node: int
    working_dir: Path
    log: str
    dependency: str | None
    python: str
    mounts: Sequence[Mount]


def batch_script(cluster: ClusterConfig, job: Job) -> str:
    """Return the whole script.

    Raises:
        UserError: a directive is invalid, or set by launch itself; the name of a variable is invalid; a text contains a
            line break.
    """
    lines = ["#!/bin/bash", "# Made by nemo-rao launch. A requeued job runs it again: one attempt."]
    lines += [directive(name, value) for name, value in _directives(cluster, job)]
    # User input must not be expanded; functions are called by traps.
    lines += [
        "",
        "# shellcheck disable=SC2016,SC2329",
        "set -u",
        "",
        "# The run, or that of this array element, and the directory of its records.",
    ]
    lines += [f"runs=({_words(run.outside for run in job.runs)})"]
    lines += [f"runs_inside=({_words(run.inside for run in job.runs)}) # as tasks see them"]
    lines += [_RECORDS]
    lines += ["# The environment of tasks."]
    environment = {**ENVIRONMENT, HANG_SECONDS: f"{cluster.hang_minutes * 60:g}", **cluster.environment}
    lines += [f"export {_variable(name)}={_quoted(value)}" for name, value in environment.items()]
    lines += [f"export {FOLDER}=$records_inside", f"unset {' '.join(NOT_INHERITED)}", ""]
    lines += ["# One task per GPU; the failure of one ends all."]
    # Not inherited from sbatch since SLURM 22.05.
    cpus = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]
    srun = ["srun", "--kill-on-bad-exit=1", "--open-mode=append", *cpus, *_container(cluster, job)]
    train = [job.python, "-m", "nemo_rao", "train"]
    lines += [f'start=({_words(srun)} "--output=$records/rank-%t.log")']
    lines += [f'train=({_words(train)} --config-dir "$run_inside/slurm" --config-name {job.recipe})', ""]
    lines += [f"max_restarts={cluster.max_restarts}", f"requeues={'yes' if cluster.requeue else 'no'}"]
    lines += [f"patience={max(1, cluster.save_seconds - LATE_SECONDS)} # seconds", _ATTEMPT]
    return "\n".join(lines)


_RECORDS = """\
element=${SLURM_ARRAY_TASK_ID:-0}
run=${runs[element]}
run_inside=${runs_inside[element]}
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  job=${SLURM_ARRAY_JOB_ID}_$element
fi
restarts=${SLURM_RESTART_COUNT:-0}
records=$run/slurm/job-$job
records_inside=$run_inside/slurm/job-$job
mkdir -p "$records"
rm -f "$records/stopped" "$records/failure"

report() {
  echo "[nemo-rao] $(date '+%F %T') $*"
}
report "job $job, attempt $((restarts + 1)), on $SLURM_JOB_NODELIST"

# Ranks meet at the first node; jobs that share it at different ports.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
"""
assert FAILURE in _RECORDS and STOPPED in _RECORDS

_ATTEMPT = """\

# Requeues the job, which ends this script. A job that is being canceled stays canceled.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$job" --format=%T)
  if [ "$requeues" != yes ]; then
    report "not requeued (cluster.requeue=false); the same launch command resumes the run"
  elif [ "$state" != RUNNING ]; then
    report "not requeued: the job is ${state:-gone}"
  elif [ "$restarts" -ge "$max_restarts" ]; then
    report "not requeued: restarted $restarts times (cluster.max_restarts)"
  elif scontrol requeue "$job"; then
    report "requeued"
    sleep 600 # until SLURM ends this script
  else
    report "could not be requeued"
  fi
  return 1
}

late() {
  sleep "$patience"
  kill -0 $$ 2> /dev/null || exit # this attempt is over; some clusters leave background processes running
  report "the run has not saved in time (cluster.save_seconds): the next attempt resumes from the last checkpoint"
  requeue
}

asked=
ranks=
clock=
ask() {
  if [ -z "$asked" ]; then
    report "signal received:  the run saves a checkpoint and stops"
    late &
    clock=$!
  fi
  asked=yes
  if [ -n "$ranks" ]; then
    kill -USR1 "$ranks" 2> /dev/null # srun passes it on to every task
  fi
}
trap ask USR1 TERM

"${start[@]}" "${train[@]}" &
ranks=$!
wait "$ranks"
code=$?
while [ "$code" -gt 128 ] && kill -0 "$ranks" 2> /dev/null; do # a signal has ended wait, but not srun
  wait "$ranks"
  code=$?
done
trap : USR1 TERM # ignore further signals, which SLURM sends when the job ends
if [ -n "$clock" ]; then
  kill "$clock" 2> /dev/null
fi

# When a rank fails, the others are signalled, too: they have stopped, but srun's exit code is not 0.
if [ "$code" -eq 0 ] && [ -e "$records/stopped" ]; then
  report "$(cat "$records/stopped")"
  requeue
  exit 1
elif [ "$code" -eq 0 ]; then
  report "finished"
  exit 0
fi
report "failed: srun exited with code $code; logs of all ranks: $records"
if [ -s "$records/failure" ]; then
  cat "$records/failure"
fi
for log in "$records"/rank-*.log; do
  if tail -n 200 "$log" | grep -q "^Fatal Python error"; then
    echo "$log:"
    tail -n 200 "$log" | sed -n '/^Fatal Python error/,$p' | head -n 60
  fi
done
if [ -n "$asked" ] && [ ! -s "$records/failure" ]; then # a rank that did not handle signals yet
  requeue
fi
exit "$code"
"""


def _directives(cluster: ClusterConfig, job: Job) -> Iterable[tuple[str, str | None]]:
    yield "job-name", re.sub(r"[^\w.+-]", "_", job.name)
    assert cluster.partition is not None, "checked earlier"
    yield "partition", cluster.partition
    if cluster.account is not None:
        yield "account", cluster.account
    yield "nodes", str(job.num_nodes)
    yield "ntasks-per-node", str(job.ranks_per_node)
    if cluster.gpu_request == "gpus-per-node":
        yield "gpus-per-node", str(job.ranks_per_node)
    elif cluster.gpu_request == "gres":
        yield "gres", f"gpu:{job.ranks_per_node}"
    if cluster.cpus_per_task is not None:
        yield "cpus-per-task", str(cluster.cpus_per_task)
    yield "time", cluster.time
    if cluster.exclusive:
        yield "exclusive", None
    # Only to the batch script, which requeues the job.
    yield "signal", f"B:USR1@{cluster.save_seconds}"
    yield ("requeue" if cluster.requeue else "no-requeue"), None  # SLURM requeues the job after the loss of a node
    yield "open-mode", "append"  # a later attempt must not overwrite an earlier one's output
    yield "output", job.log
    yield "chdir", str(job.working_dir)
    if len(job.runs) > 1:
        limit = "" if cluster.array_limit is None else f"%{cluster.array_limit}"
        yield "array", f"0-{len(job.runs) - 1}{limit}"
    if job.dependency is not None:
        yield "dependency", job.dependency
        yield "kill-on-invalid-dep", "yes"  # instead of waiting forever
    for name, value in cluster.directives.items():
        if name in _OURS:
            raise UserError(f"cluster.directives.{name}: is set by launch itself. Use the cluster's other keys.")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise UserError(f"cluster.directives.{name}: must be a long option of sbatch, such as qos.")
        if value is not False and value is not None:
            yield name, None if value is True else str(value)


def directive(name: str, value: str | None) -> str:
    """Return one ``#SBATCH`` line.

    sbatch has its own syntax: blanks end a word unless it is quoted, # begins a comment even in quotes, and a backslash
    escapes any other character.

    Raises:
        UserError: the value has a line break, after which sbatch would read something else.
    """
    if value is None:
        return f"#SBATCH --{name}"
    _refuse_control_characters(f"--{name}={value}")
    escaped = re.sub(r"([^\w@%+=:,./\[\]-])", r"\\\1", value)
    return f"#SBATCH --{name}=" + (escaped if escaped == value else f'"{escaped}"')


def _container(cluster: ClusterConfig, job: Job) -> list[str]:
    if cluster.container is None:
        return []
    return [
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join(map(str, job.mounts))}",
        f"--container-workdir={job.working_dir}",
    ]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(f"cluster.environment: {name!r} is not a valid variable name. Use letters, digits and _.")
    return name


def _words(values: Iterable[object]) -> str:
    return " ".join(_quoted(str(value)) for value in values)


def _quoted(value: str) -> str:
    _refuse_control_characters(value)
    return shlex.quote(value)


def _refuse_control_characters(value: str) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise UserError(f"{value!r}: control characters, such as line breaks, are not allowed in a batch script.")
