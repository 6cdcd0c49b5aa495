"""Every key of a cluster's file, with its default and comment: where a run is to be started, and how.

These are no keys of a recipe: the same run on another cluster is the same run. ``nemo-rao launch`` alone reads them,
from ``conf/cluster/NAME.yaml`` (``cluster=NAME``) and from ``cluster.KEY=VALUE``. What a run takes, ``trainer.devices``
and ``trainer.num_nodes``, is the recipe's; a cluster's file says what there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rao.config.compose import package_recipes
from nemo_rao.errors import UserError
from nemo_rao.keys import check, key


@dataclass
class ClusterConfig:
    scheduler: str = key(
        "slurm", "slurm: a job is submitted; local: the run starts here, in this process", choices=("slurm", "local")
    )
    partition: str | None = key(None, "partition that jobs go to; SLURM needs one")
    account: str | None = key(None, "account that jobs are charged to; null: the user's default")
    nodes: int | None = key(None, "most nodes that a job may take; trainer.num_nodes has to fit; null: any", low=1)
    gpus_per_node: int | None = key(
        None, "GPUs of a node; trainer.devices, the tasks on each node, has to fit; null: any", low=1
    )
    gpu: str | None = key(
        None,
        "which GPUs a node has, as in `nemo-rao plan --gpu`, such as h100; null: not known, what FP8 needs of it is"
        " found when the job starts",
    )
    gpu_request: str = key(
        "gpus-per-node",
        "how a job asks for GPUs: --gpus-per-node=N, --gres=gpu:N, or not at all, where nodes are given whole or have "
        "none. Every task sees all GPUs of its node, as NCCL wants it, and takes the one of its local rank",
        choices=("gpus-per-node", "gres", "none"),
    )
    cpus_per_task: int | None = key(None, "CPU cores of each task; null: as the partition decides", low=1)
    time: str = key("4:00:00", "time limit of one life of a job: minutes, H:MM:SS, D-HH:MM:SS, or UNLIMITED")
    exclusive: bool = key(False, "share nodes with nobody")
    directives: dict[str, Any] = key(
        {}, "further options of sbatch by their long names, such as {qos: high, mail-type: FAIL}; true: without a value"
    )
    container: str | None = key(
        None,
        "image that tasks run in, by pyxis and enroot: the path of a file such as /images/nemo_rao.sqsh, or a name "
        "in a registry such as nvcr.io#nvidia/nemo:25.11; null: tasks run as this machine does, without a container",
    )
    mounts: list[str] = key(
        [],
        "folders that a container sees, OUTSIDE or OUTSIDE:INSIDE; the folder in which launch is called always is one. "
        "Paths in a recipe are those inside",
    )
    python: str | None = key(
        None, "Python that has nemo_rao, as a task sees it; null: the one that launches, in a container python"
    )
    environment: dict[str, str] = key(
        {}, "variables of every task, such as {NCCL_SOCKET_IFNAME: ib0}; they replace those that the script sets"
    )
    requeue: bool = key(
        True,
        "before the time limit and on pre-emption, the job saves a checkpoint and is queued again; false: it ends",
    )
    save_seconds: int = key(
        300,
        "seconds before the time limit at which the run is told to save; a step and a checkpoint have to fit",
        low=1,
    )
    max_lives: int = key(
        100, "starts of one job, the first included; then it ends instead of being queued again", low=1
    )
    hang_minutes: float = key(
        30.0,
        "minutes in which a rank has computed no micro-batch and finished no step or checkpoint, after which the job "
        "ends",
        low=0,
        exclusive=True,
    )
    array_limit: int | None = key(None, "runs of a sweep at the same time; null: as many as there is room for", low=1)
    poll_seconds: float = key(5.0, "seconds from one look at the job to the next, while it is followed", low=0.1)


DEFAULT = "local"  # without cluster=


def read_cluster(overrides: Sequence[str], config_dir: str | None) -> tuple[str, ClusterConfig, list[str]]:
    """The cluster that a command line names, its name, and the overrides that are left for the recipe.

    Args:
        overrides: ``cluster=NAME`` or ``cluster=FILE.yaml``, ``cluster.KEY=VALUE``, and those of the recipe.
        config_dir: a folder of the user's own files, looked into first: ``cluster/NAME.yaml``.

    Raises:
        UserError: no such file, an unknown key, a value that it does not allow.
    """
    name, own, left = DEFAULT, [], []
    for text in overrides:
        given, equals, value = text.partition("=")
        if given == "cluster" and equals:
            name = value
        elif given.startswith("cluster."):
            own.append(text)
        else:
            left.append(text)
    path = _find(name, config_dir)
    values = _read(path)
    for text in own:
        values |= _parse(text)
    return name, _typed(values, where=str(path)), left


def cluster_names(folders: Sequence[Path]) -> list[str]:
    return sorted({file.stem for folder in folders for file in folder.glob("cluster/*.yaml")})


def seconds_of(time: str) -> float:
    """A time limit as sbatch reads it, in seconds.

    Raises:
        UserError: it is none.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?", time)
    if found is None:
        raise UserError(f"cluster.time={time}: give minutes, H:MM:SS, D-HH:MM:SS or UNLIMITED")
    days, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1] is not None or found[4] is not None:  # days-hours[:minutes[:seconds]], hours:minutes:seconds
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second  # minutes[:seconds]


def _find(name: str, config_dir: str | None) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"cluster={name}: no such file")
        return path
    folders = [package_recipes()]
    if config_dir is not None:
        folders.insert(0, Path(config_dir).expanduser())
    for folder in folders:
        if (path := folder / "cluster" / f"{name}.yaml").is_file():
            return path
    names = cluster_names(folders)
    near = difflib.get_close_matches(name, names, n=1)
    raise UserError(
        f"cluster={name}: no such file{f', did you mean {near[0]}' if near else ''}; there are {', '.join(names)}. "
        "Your own is DIR/cluster/NAME.yaml with --config-dir DIR, or cluster=PATH.yaml"
    )


class _Loader(yaml.SafeLoader):
    """YAML in which 4:00:00 is a text; YAML 1.1 reads it as the number 14400."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+\.\d*$"), list("-+0123456789"))


def _read(path: Path) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text())
        given = loader.get_single_data()
        given = OmegaConf.to_container(OmegaConf.create(given or {}), resolve=True)  # ${oc.env:USER}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise UserError(f"{path}: it must be keys and values, such as partition: batch")
    return {str(name): value for name, value in given.items()}


def _parse(text: str) -> dict[str, Any]:
    """``cluster.KEY=VALUE``, read as Hydra reads it; what it cannot read, such as a path with ``~``, as it stands."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} is not an override; write cluster.key=value")
    try:
        parsed = OverridesParser.create().parse_override(f"value={value}")
        read = value if parsed.is_sweep_override() else parsed.value()
    except HydraException:
        read = value
    return {name.removeprefix("cluster."): read}


def _typed(values: Mapping[str, Any], *, where: str) -> ClusterConfig:
    known = {field.name: field for field in dataclasses.fields(ClusterConfig)}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"{where}: unknown key {name}; {remedy}")
        kind = known[name].type
        if kind == "float" and type(value) is int:
            value = float(value)
        elif kind in ("str", "str | None") and type(value) in (int, float):
            value = str(value)  # an account or a partition named by a number, a time in minutes
        elif kind == "dict[str, str]" and isinstance(value, dict):
            value = {name: str(item) if type(item) in (int, float) else item for name, item in value.items()}
        arguments[name] = value
    config = ClusterConfig(**arguments)
    try:
        check(config, "cluster")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


# ------------------------------------------------------------------------------------------------ inside and outside


@dataclass(frozen=True)
class Mount:
    outside: Path
    inside: Path
    flags: str  # such as "ro"

    def __str__(self) -> str:
        return ":".join([str(self.outside), str(self.inside), *filter(None, [self.flags])])


def mounts(cluster: ClusterConfig, working_dir: Path) -> list[Mount]:
    """What a container sees of this machine's folders, the working folder under its own name; none without one."""
    if cluster.container is None:
        return []
    found = []
    for text in cluster.mounts:
        outside, _, rest = text.partition(":")
        inside, _, flags = rest.partition(":")
        found.append(Mount(Path(outside).expanduser(), Path(inside or outside), flags))
    return [*found, Mount(working_dir, working_dir, "")]


def outside(path: Path, mounted: Sequence[Mount], working_dir: Path) -> Path | None:
    """Where a path that a task sees lies on this machine; ``None``: in no folder that its container sees."""
    absolute = Path(os.path.normpath(working_dir / path.expanduser()))
    if not mounted:
        return absolute
    for mount in sorted(mounted, key=lambda mount: len(mount.inside.parts), reverse=True):
        if absolute.is_relative_to(mount.inside):
            return mount.outside / absolute.relative_to(mount.inside)
    return None
