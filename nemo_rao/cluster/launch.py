"""``nemo-rao launch``: submit and follow a job, from a recipe and a cluster's file.

    overrides -> cluster's keys, recipe's keys -> all checks, before any file is written
        scheduler local: the run, in this process
        scheduler slurm: RUN/slurm/recipe-DIGEST.yaml + batch script -> sbatch -> RUN/slurm/jobs.jsonl -> follow

A sweep (``--multirun``) becomes a job array with one element per run.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.continuing import check_settings, describe
from nemo_rao.checkpoint.experts import check_resumed_experts
from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.cluster import slurm
from nemo_rao.cluster.config import ClusterConfig, Mount, mounts, outside, read_cluster, seconds_of
from nemo_rao.cluster.follow import follow
from nemo_rao.cluster.records import FOLDER, JobRecord, add_record, read_records
from nemo_rao.cluster.script import LATE_SECONDS, Job, RunFolder, batch_script
from nemo_rao.config.checks import check_keys_are_read
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import run_dir
from nemo_rao.config.precision_checks import check_named_gpu
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, errors_at
from nemo_rao.runtime.files import write_atomically
from nemo_rao.training.checks import check_run
from nemo_rao.training.sweep import Sweep, plan


def main(arguments: argparse.Namespace) -> int:
    _, cluster, overrides = read_cluster(arguments.overrides, arguments.config_dir)
    sweep, config = None, None
    if arguments.multirun:
        sweep = plan(arguments.config_name, overrides, arguments.config_dir)
        runs = [(run.label, run.config) for run in sweep.runs]
    else:
        config = compose(arguments.config_name, overrides, arguments.config_dir)
        check_keys_are_read(overrides, config)
        runs = [("", config)]
    if cluster.scheduler == "local":
        if arguments.dependency is not None:
            raise UserError(
                f"--dependency {arguments.dependency}: only jobs have dependencies. Name a cluster, cluster=NAME."
            )
        for label, run in runs:
            with errors_at(label):
                check_size(cluster, run)
                check_run(run)
        return 0 if arguments.dry_run else _run_here(sweep, config)
    return _submit(cluster, arguments, runs, sweep)


def _run_here(sweep: Sweep | None, config: RunConfig | None) -> int:
    if sweep is not None:
        from nemo_rao.training.sweep import run_sweep

        return run_sweep(sweep)
    from nemo_rao.training.train import train

    assert config is not None
    train(config)
    return 0


def _submit(
    cluster: ClusterConfig, arguments: argparse.Namespace, runs: Sequence[tuple[str, RunConfig]], sweep: Sweep | None
) -> int:
    working_dir = Path.cwd()
    check_cluster(cluster)
    mounted = mounts(cluster, working_dir)
    after, awaited = _dependency(arguments.dependency)
    folders = []
    for label, config in runs:
        with errors_at(label):
            check_size(cluster, config)
            folders.append(check_paths(cluster, config, mounted, working_dir, awaited))
            check_resume(config, folders[-1].outside)
            if after is None:
                _check_no_job(folders[-1].outside)
    first = runs[0][1]
    for label, config in runs:
        if (config.trainer.devices, config.trainer.num_nodes) != (first.trainer.devices, first.trainer.num_nodes):
            raise UserError(
                f"{label}: trainer.devices x trainer.num_nodes: are {config.trainer.devices} x "
                f"{config.trainer.num_nodes}, but {first.trainer.devices} x {first.trainer.num_nodes} in the sweep's "
                "first run, and the elements of a job array must use the same nodes. Launch them separately."
            )
    if sweep is not None:
        of_logs = folders[0].outside.with_name(f"{sweep.name}.{FOLDER}")
    else:
        of_logs = folders[0].outside / FOLDER
    several = len(runs) > 1
    # Each job has its own copy of the recipe: a requeued job reads it again, whatever has been launched since.
    recipes = [to_yaml(config) for _, config in runs]
    recipe = f"recipe-{hashlib.sha256(''.join(recipes).encode()).hexdigest()[:12]}"
    job = Job(
        name=sweep.name if sweep is not None else first.exp_manager.name,
        runs=folders,
        recipe=recipe,
        num_nodes=first.trainer.num_nodes,
        ranks_per_node=first.trainer.devices,
        working_dir=working_dir,
        log=f"{of_logs}/job-{'%A_%a' if several else '%j'}.log",
        dependency=after,
        python=cluster.python or ("python" if cluster.container is not None else sys.executable),
        mounts=mounted,
    )
    script = batch_script(cluster, job)
    if arguments.dry_run:
        print(script, end="")
        return 0
    slurm.check_script(script)
    of_logs.mkdir(parents=True, exist_ok=True)
    for folder, text in zip(folders, recipes, strict=True):
        write_atomically(folder.outside / FOLDER / f"{recipe}.yaml", text)
    write_atomically(of_logs / "job.sbatch", script)
    number = slurm.submit(script)
    submitted = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    records = []
    for element, folder in enumerate(folders):
        name = f"{number}_{element}" if several else number
        records.append(JobRecord(name, submitted, str(of_logs / f"job-{name}.log")))
        add_record(folder.outside, records[-1])
    print(f"submitted job {number}; logs: {of_logs}", flush=True)
    if arguments.detach:
        return 0
    return follow(None if several else folders[0].outside, records, poll_seconds=cluster.poll_seconds)


# ----------------------------------------------------------------------------------------------------------- checks

# Keys that name files or directories, except the run's directory: (section, key).
PATHS = (
    *(("data", "train_path"), ("data", "validation_path"), ("data", "tokenizer"), ("data", "cache_dir")),
    *(("model", "restore_from_path"), ("reference", "cache_dir")),
)


def check_cluster(cluster: ClusterConfig) -> None:
    """Check everything that depends only on the cluster's keys, and the files they name.

    Raises:
        UserError: on the first violated rule.
    """
    if not cluster.partition:
        raise UserError("cluster.partition: is not set. Name the partition for jobs (sinfo lists them).")
    limit = seconds_of(cluster.time)
    if cluster.requeue and cluster.save_seconds + LATE_SECONDS >= limit:
        raise UserError(
            f"cluster.save_seconds={cluster.save_seconds}: is not below cluster.time={cluster.time} ({limit:g} "
            "seconds), so saving would begin before the run. Lower it, or raise cluster.time."
        )
    if cluster.save_seconds > 65535:
        raise UserError(f"cluster.save_seconds={cluster.save_seconds}: must be at most 65535, SLURM's maximum.")
    if cluster.mounts and cluster.container is None:
        raise UserError(f"cluster.mounts={cluster.mounts}: there is no container to mount into. Set cluster.container.")
    image = cluster.container
    is_path = image is not None and (image.startswith(("/", ".", "~")) or image.endswith(".sqsh"))
    if image is not None and is_path and not Path(image).expanduser().is_file():
        raise UserError(
            f"cluster.container={image}: no such file. Give an image (enroot import makes one), or a name in a "
            "registry such as nvcr.io#nvidia/nemo:25.11."
        )
    for mount in mounts(cluster, Path.cwd())[:-1]:
        if not mount.outside.is_absolute() or not mount.inside.is_absolute():
            raise UserError(f"cluster.mounts: {mount}: must be absolute paths, OUTSIDE:INSIDE.")
        if not mount.outside.exists():
            raise UserError(
                f"cluster.mounts: {mount.outside}: no such file or directory on this machine. Correct the path."
            )
        if "," in str(mount):
            raise UserError(
                f"cluster.mounts: {mount}: must not contain a comma, which separates mounts. Use another path."
            )


def check_size(cluster: ClusterConfig, config: RunConfig) -> None:
    """Refuse a run that needs more GPUs than the cluster has, or features that its GPUs lack.

    Raises:
        UserError: names both numbers.
    """
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if cluster.nodes is not None and cluster.gpus_per_node is not None:
        there = cluster.nodes * cluster.gpus_per_node
        if devices * nodes > there:
            raise UserError(
                f"trainer.devices={devices} x trainer.num_nodes={nodes}: are {devices * nodes} GPUs, but cluster.nodes="
                f"{cluster.nodes} x cluster.gpus_per_node={cluster.gpus_per_node} are only {there}. Lower the first, "
                "or choose another cluster."
            )
    if cluster.gpus_per_node is not None and devices > cluster.gpus_per_node:
        raise UserError(
            f"trainer.devices={devices}: is above cluster.gpus_per_node={cluster.gpus_per_node}. Lower it and raise "
            "trainer.num_nodes."
        )
    if cluster.nodes is not None and nodes > cluster.nodes:
        raise UserError(
            f"trainer.num_nodes={nodes}: is above cluster.nodes={cluster.nodes}. Lower it, or raise cluster.nodes."
        )
    if cluster.gpu is not None:
        check_named_gpu(config, cluster.gpu, f"cluster.gpu={cluster.gpu}")


def check_paths(
    cluster: ClusterConfig,
    config: RunConfig,
    mounted: Sequence[Mount],
    working_dir: Path,
    awaited: Sequence[Path] = (),
) -> RunFolder:
    """Check the run as ``nemo-rao train`` does, with paths translated to those of this machine.

    Args:
        awaited: directories of runs that the job will wait for; their files need not exist yet.

    Returns:
        the run's directory.

    Raises:
        UserError: see :func:`nemo_rao.training.checks.check_run`; or tasks cannot write to the output directory.
    """
    inside = Path(os.path.normpath(working_dir / run_dir(config)))
    folder = outside(inside, mounted, working_dir)
    if folder is None:
        raise UserError(
            f"exp_manager.exp_dir={config.exp_manager.exp_dir}: is not inside a directory that the container mounts. "
            "Add it to cluster.mounts."
        )
    if re.search(r"[%\\]", str(folder)):
        raise UserError(
            f"exp_manager: {folder}: must not contain % or \\, special in log names of SLURM. Choose another."
        )

    def here(key: str, value: Any) -> Any:
        """Translate a path to this machine; names on huggingface.co and relative paths are unchanged."""
        if isinstance(value, list):
            return [here(key, item) for item in value]
        if not isinstance(value, str) or not mounted or not value.startswith(("/", "~", "..")):
            return value
        if (found := outside(Path(value), mounted, working_dir)) is None:
            raise UserError(
                f"{key}={value}: is not inside a directory that the container mounts. Add it to cluster.mounts."
            )
        return str(found)

    seen = copy.deepcopy(config)
    for section, name in PATHS:
        keys = vars(vars(seen)[section])
        keys[name] = here(f"{section}.{name}", keys[name])
    seen.exp_manager.exp_dir, start = str(folder.parent), seen.model.restore_from_path
    start_exists = True
    if start is not None:
        path = (working_dir / Path(start).expanduser()).resolve()
        start_exists = not any(path.is_relative_to(run.resolve()) for run in awaited)
    check_run(seen, start_exists=start_exists)
    if cluster.requeue and not config.exp_manager.resume_if_exists:
        raise UserError(
            "exp_manager.resume_if_exists=false: a requeued job would start over. Set it to true, or "
            "cluster.requeue=false."
        )
    if cluster.requeue and not config.exp_manager.checkpoint_callback_params.save_last:
        raise UserError(
            "exp_manager.checkpoint_callback_params.save_last=false: a requeued job resumes from the last checkpoint. "
            "Set it to true, or cluster.requeue=false."
        )
    return RunFolder(outside=folder, inside=inside)


def check_resume(config: RunConfig, folder: Path) -> None:
    """Print where a run of this name would resume; refuse changes of its numbers.

    Checkpoints can be loaded under any parallelism, but the numbers then agree to rounding, not bit for bit. Whether a
    checkpoint is damaged, and whether the data has changed, is checked in the job.

    Raises:
        UserError: see :func:`nemo_rao.checkpoint.continuing.check_settings`; or experts are split differently.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return
    changes = check_settings(config, folder)
    check_resumed_experts(config, folder)
    print(f"resumes from {checkpoint}", flush=True)
    for line in describe(changes):
        print(line, flush=True)


def _check_no_job(folder: Path) -> None:
    """Refuse a second job in a directory, which would overwrite the first one's files."""
    records = read_records(folder)
    for state in slurm.job_states(records[-1].job) if records else []:
        if state.is_active:
            raise UserError(
                f"{folder}: {state}, already trains this run. Follow it with nemo-rao status {folder} --follow, cancel "
                f"it with scancel {state.job}, or wait for it with --dependency afterany:{state.job}"
            )


def _dependency(given: str | None) -> tuple[str | None, list[Path]]:
    """Return sbatch's dependency, and the directories of runs among it.

    Raises:
        UserError: it is neither SLURM's syntax nor the directory of a launched run.
    """
    if given is None:
        return None, []
    folder = Path(given).expanduser()
    if folder.is_dir():
        records = read_records(folder)
        if not records:
            raise UserError(f"--dependency {given}: is a directory, but not that of a run launched as a job. Name one.")
        return f"afterok:{records[-1].job}", [folder.absolute()]
    one = r"(singleton|after\w*(:\d+(_\d+)?(\+\d+)?)+)"
    if not re.fullmatch(rf"{one}([,?]{one})*", given):
        raise UserError(
            f"--dependency {given}: must be a dependency of sbatch, such as afterok:17, or a launched run's directory."
        )
    return given, []
