"""The text of a job's batch script, from a cluster's keys and the runs that the job trains.

One attempt of a job, until it ends or is requeued::

    srun, one task a GPU: nemo-rao train --config-dir RUN/slurm --config-name recipe-DIGEST
        |  USR1 before the time limit or at pre-emption -> to the tasks, which save and leave RUN/slurm/job-N/stopped
        v
    stopped            scontrol requeue: the next attempt continues from the checkpoint
    succeeded          the job is done
    failed             the record of the first rank that failed, then the end of the job with srun's code

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

LATE_SECONDS = 20  # before the time limit, a job whose ranks have not saved by then is queued again without them

# What tasks find in their environment unless the cluster's keys say otherwise.
ENVIRONMENT: Mapping[str, str] = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a lost peer ends a rank instead of leaving it to wait
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron: communication is to start before the computation it overlaps
    "PYTHONFAULTHANDLER": "1",  # a rank that crashes prints its stack
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_MININTERVAL": "30",  # seconds: other packages' progress in a file
}
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")  # of a launcher around launch
_OURS = frozenset(
    (
        *("job-name", "partition", "account", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "gres"),
        *("cpus-per-task", "time", "exclusive", "signal", "requeue", "no-requeue", "open-mode", "output", "error"),
        *("chdir", "array", "dependency", "kill-on-invalid-dep", "wrap", "parsable", "test-only"),
    )
)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, ``exp_dir/name``: as this machine sees it, and as the tasks do."""

    outside: Path
    inside: Path


@dataclass(frozen=True)
class Job:
    """What a batch script is made for.

    Attributes:
        name: any text.
        runs: one, or those of a sweep, each an element of a job array.
        recipe: name of each run's recipe in its folder, ``RUN/slurm/NAME.yaml``.
        num_nodes, ranks_per_node: of each run.
        working_dir: of the tasks.
        log: file of the batch script's output; ``%j`` is the job, ``%A_%a`` the array and the element.
        dependency: as sbatch takes it, or ``None``.
        python: that has nemo_rao, as a task sees it.
        mounts: of the container, see :func:`nemo_rao.cluster.config.mounts`.
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
    """The whole script.

    Raises:
        UserError: a directive that is not one, or that launch sets itself; a variable's name that is not one; a text
            with a line break.
    """
    lines = ["#!/bin/bash", "# Made by nemo-rao launch. A requeued job runs it again: one attempt."]
    lines += [directive(name, value) for name, value in _directives(cluster, job)]
    # What a user gives is not to be expanded; functions are called by traps.
    lines += [
        "",
        "# shellcheck disable=SC2016,SC2329",
        "set -u",
        "",
        "# The run, or this array element's, and where its records are.",
    ]
    lines += [f"runs=({_words(run.outside for run in job.runs)})"]
    lines += [f"runs_inside=({_words(run.inside for run in job.runs)}) # as tasks see them"]
    lines += [_PLACE]
    lines += ["# The environment of tasks."]
    environment = {**ENVIRONMENT, HANG_SECONDS: f"{cluster.hang_minutes * 60:g}", **cluster.environment}
    lines += [f"export {_variable(name)}={_quoted(value)}" for name, value in environment.items()]
    lines += [f"export {FOLDER}=$records_inside", f"unset {' '.join(NOT_INHERITED)}", ""]
    lines += ["# One task for each GPU; the failure of one ends all."]
    # Not inherited from sbatch since SLURM 22.05.
    cpus = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]
    srun = ["srun", "--kill-on-bad-exit=1", "--open-mode=append", *cpus, *_container(cluster, job)]
    train = [job.python, "-m", "nemo_rao", "train"]
    lines += [f'start=({_words(srun)} "--output=$records/rank-%t.log")']
    lines += [f'train=({_words(train)} --config-dir "$run_inside/slurm" --config-name {job.recipe})', ""]
    lines += [f"max_restarts={cluster.max_restarts}", f"requeues={'yes' if cluster.requeue else 'no'}"]
    lines += [f"patience={max(1, cluster.save_seconds - LATE_SECONDS)} # seconds", _ATTEMPT]
    return "\n".join(lines)


_PLACE = """\
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

tell() {
  echo "[nemo-rao] $(date '+%F %T') $*"
}
tell "job $job, attempt $((restarts + 1)), on $SLURM_JOB_NODELIST"

# Ranks meet at the first node; jobs that share it at different ports.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
"""
assert FAILURE in _PLACE and STOPPED in _PLACE

_ATTEMPT = """\

# Puts the job into the queue again, which ends this script. A job that is being cancelled stays so.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$job" --format=%T)
  if [ "$requeues" != yes ]; then
    tell "not queued again (cluster.requeue=false); the same launch continues the run"
  elif [ "$state" != RUNNING ]; then
    tell "not queued again: the job is ${state:-gone}"
  elif [ "$restarts" -ge "$max_restarts" ]; then
    tell "not queued again: restarted $restarts times (cluster.max_restarts)"
  elif scontrol requeue "$job"; then
    tell "queued again"
    sleep 600 # until SLURM ends this script
  else
    tell "could not be queued again"
  fi
  return 1
}

late() {
  sleep "$patience"
  kill -0 $$ 2> /dev/null || exit # this attempt is over; not every cluster ends what it has left in the background
  tell "the run has not saved in time (cluster.save_seconds): the next attempt continues from the last checkpoint"
  requeue
}

asked=
ranks=
clock=
ask() {
  if [ -z "$asked" ]; then
    tell "a signal: the run saves a checkpoint and stops"
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
while [ "$code" -gt 128 ] && kill -0 "$ranks" 2> /dev/null; do # a signal has ended wait, not srun
  wait "$ranks"
  code=$?
done
trap : USR1 TERM # what comes now, with SLURM's own end of the job, asks for nothing
if [ -n "$clock" ]; then
  kill "$clock" 2> /dev/null
fi

# A rank that fails ends the others by a signal, too: they have stopped, but srun's code is not 0.
if [ "$code" -eq 0 ] && [ -e "$records/stopped" ]; then
  tell "$(cat "$records/stopped")"
  requeue
  exit 1
elif [ "$code" -eq 0 ]; then
  tell "finished"
  exit 0
fi
tell "failed: srun ended with code $code; logs of all ranks: $records"
if [ -s "$records/failure" ]; then
  cat "$records/failure"
fi
for log in "$records"/rank-*.log; do
  if tail -n 200 "$log" | grep -q "^Fatal Python error"; then
    echo "$log:"
    tail -n 200 "$log" | sed -n '/^Fatal Python error/,$p' | head -n 60
  fi
done
if [ -n "$asked" ] && [ ! -s "$records/failure" ]; then # a rank that had not begun to listen
  requeue
fi
exit "$code"
"""


def _directives(cluster: ClusterConfig, job: Job) -> Iterable[tuple[str, str | None]]:
    yield "job-name", re.sub(r"[^\w.+-]", "_", job.name)
    assert cluster.partition is not None, "checked before"
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
    # To the batch script alone: it is the one that knows how to queue the job again.
    yield "signal", f"B:USR1@{cluster.save_seconds}"
    yield ("requeue" if cluster.requeue else "no-requeue"), None  # after the loss of a node, SLURM does it
    yield "open-mode", "append"  # a later attempt does not erase what an earlier one has written
    yield "output", job.log
    yield "chdir", str(job.working_dir)
    if len(job.runs) > 1:
        limit = "" if cluster.array_limit is None else f"%{cluster.array_limit}"
        yield "array", f"0-{len(job.runs) - 1}{limit}"
    if job.dependency is not None:
        yield "dependency", job.dependency
        yield "kill-on-invalid-dep", "yes"  # rather than waiting for ever
    for name, value in cluster.directives.items():
        if name in _OURS:
            raise UserError(f"cluster.directives.{name}: launch sets --{name} itself; use the cluster's other keys")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise UserError(f"cluster.directives.{name}: give an option of sbatch by its long name, such as qos")
        if value is not False and value is not None:
            yield name, None if value is True else str(value)


def directive(name: str, value: str | None) -> str:
    """One ``#SBATCH`` line.

    sbatch reads it with rules of its own: blanks end a word unless it is quoted, and # begins a comment even then; a
    backslash makes any other character stand for itself.

    Raises:
        UserError: a value with a line break, after which sbatch would read something else.
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
        raise UserError(f"cluster.environment: {name!r} is no name of a variable; use letters, digits and _")
    return name


def _words(values: Iterable[object]) -> str:
    return " ".join(_quoted(str(value)) for value in values)


def _quoted(value: str) -> str:
    _refuse_control_characters(value)
    return shlex.quote(value)


def _refuse_control_characters(value: str) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise UserError(f"{value!r}: line breaks and other control characters cannot stand in a batch script")
