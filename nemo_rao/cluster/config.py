"""Every key of a cluster's file, with its default and comment: where and how a run is started.

These keys are not part of a recipe: the same run on another cluster is the same run. Only ``nemo-rao launch`` reads
them, from ``conf/cluster/NAME.yaml`` (``cluster=NAME``) and from ``cluster.KEY=VALUE``. The recipe states what a run
uses (``trainer.devices``, ``trainer.num_nodes``); a cluster's file states what is available.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rao.config.compose import package_recipes
from nemo_rao.errors import UserError, did_you_mean, errors_at
from nemo_rao.keys import key, make
from nemo_rao.runtime.console import warn_once


@dataclass
class ClusterConfig:
    scheduler: str = key(
        "slurm", "slurm: a job is submitted; local: the run starts here, in this process", choices=("slurm", "local")
    )
    partition: str | None = key(None, "partition of the jobs; required for SLURM")
    account: str | None = key(None, "account charged for the jobs; null: the user's default")
    nodes: int | None = key(None, "maximum nodes of a job; trainer.num_nodes must fit; null: any", low=1)
    gpus_per_node: int | None = key(
        None, "GPUs per node; trainer.devices, the tasks on each node, must fit; null: any", low=1
    )
    gpu: str | None = key(
        None,
        "the GPUs of a node, as in `nemo-rao plan --gpu`, such as h100; null: not known, support for FP8 is checked "
        "when the job starts",
    )
    gpu_request: str = key(
        "gpus-per-node",
        "how a job requests GPUs: --gpus-per-node=N, --gres=gpu:N, or not at all, if jobs get whole nodes or nodes "
        "have no GPUs. Every task sees all GPUs of its node, as NCCL requires, and uses that of its local rank",
        choices=("gpus-per-node", "gres", "none"),
    )
    cpus_per_task: int | None = key(None, "CPU cores of each task; null: the partition's default", low=1)
    time: str = key("4:00:00", "time limit of each start of a job: minutes, H:MM:SS, D-HH:MM:SS, or UNLIMITED")
    exclusive: bool = key(False, "do not share nodes with other jobs")
    directives: dict[str, Any] = key(
        {}, "further options of sbatch by their long names, such as {qos: high, mail-type: FAIL}; true: without a value"
    )
    container: str | None = key(
        None,
        "image that tasks run in, by pyxis and enroot: the path of a file such as /images/nemo_rao.sqsh, or a name "
        "in a registry such as nvcr.io#nvidia/nemo:25.11; null: no container",
    )
    mounts: list[str] = key(
        [],
        "directories mounted in the container, OUTSIDE or OUTSIDE:INSIDE; the directory in which launch is called is "
        "always mounted. Paths in a recipe are those inside",
    )
    python: str | None = key(
        None, "the Python with nemo_rao, as seen by a task; null: the current one, in a container python"
    )
    environment: dict[str, str] = key(
        {}, "variables of every task, such as {NCCL_SOCKET_IFNAME: ib0}; they override those that the script sets"
    )
    requeue: bool = key(
        True,
        "before the time limit and on pre-emption, save a checkpoint and requeue the job; false: save and end",
    )
    save_seconds: int = key(
        300,
        "seconds before the time limit at which the run is asked to save; a step and a checkpoint must fit",
        low=1,
    )
    max_restarts: int = key(100, "number of times that a job is requeued before it ends instead", low=0)
    hang_minutes: float = key(
        30.0,
        "minutes without a micro-batch, step or checkpoint on a rank, after which the job ends",
        low=0,
        exclusive=True,
    )
    array_limit: int | None = key(None, "runs of a sweep that may run at the same time; null: no limit", low=1)
    poll_seconds: float = key(5.0, "seconds between checks of a followed job", low=0.1)


DEFAULT = "local"  # without cluster=


def read_cluster(overrides: Sequence[str], config_dir: str | None) -> tuple[str, ClusterConfig, list[str]]:
    """The cluster that a command line names, its name, and the overrides that are left for the recipe.

    Args:
        overrides: ``cluster=NAME`` or ``cluster=FILE.yaml``, ``cluster.KEY=VALUE``, and those of the recipe.
        config_dir: a directory of the user's own files, searched first: ``cluster/NAME.yaml``.

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
    values = _renamed(_read(path), str(path))
    for text in own:
        values |= _renamed(_parse(text), text)
    with errors_at(str(path)):  # an account or a partition named by a number, a time in minutes
        return name, make(ClusterConfig, values, "cluster", numbers_as_text=True), left


def cluster_names(folders: Sequence[Path]) -> list[str]:
    return sorted({file.stem for folder in folders for file in folder.glob("cluster/*.yaml")})


def seconds_of(time: str) -> float:
    """A time limit as sbatch reads it, in seconds.

    Raises:
        UserError: it is not a time limit.
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
    near = did_you_mean(name, names, otherwise=".")
    raise UserError(
        f"cluster={name}: no such file{near} The files are {', '.join(names)}. Your own is DIR/cluster/NAME.yaml with "
        "--config-dir DIR, or cluster=PATH.yaml."
    )


class _Loader(yaml.SafeLoader):
    """YAML in which 4:00:00 is a string; YAML 1.1 reads it as the number 14400."""


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
    """``cluster.KEY=VALUE``, parsed by Hydra; what it cannot parse, such as a path with ``~``, is taken literally."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{text!r} is not an override; write cluster.key=value")
    try:
        parsed = OverridesParser.create().parse_override(f"value={value}")
        read = value if parsed.is_sweep_override() else parsed.value()
    except HydraException:
        read = value
    return {name.removeprefix("cluster."): read}


def _renamed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Keys of 0.1 under their present names, with a warning.

    Raises:
        UserError: a key is given under both names.
    """
    starts = values.get("max_lives")
    if type(starts) is not int or starts < 1:
        return values
    if "max_restarts" in values:
        raise UserError(f"{where}: max_lives and max_restarts are both given; remove max_lives")
    warn_once(f"{where}: max_lives is deprecated; set max_restarts={starts - 1}, which does not count the first start")
    others = {name: value for name, value in values.items() if name != "max_lives"}
    return {"max_restarts": starts - 1, **others}


# ------------------------------------------------------------------------------------------------ inside and outside


@dataclass(frozen=True)
class Mount:
    outside: Path
    inside: Path
    flags: str  # such as "ro"

    def __str__(self) -> str:
        return ":".join([str(self.outside), str(self.inside), *filter(None, [self.flags])])


def mounts(cluster: ClusterConfig, working_dir: Path) -> list[Mount]:
    """The directories mounted in the container, the working directory under its own name; none without a container."""
    if cluster.container is None:
        return []
    found = []
    for text in cluster.mounts:
        outside, _, rest = text.partition(":")
        inside, _, flags = rest.partition(":")
        found.append(Mount(Path(outside).expanduser(), Path(inside or outside), flags))
    return [*found, Mount(working_dir, working_dir, "")]


def outside(path: Path, mounted: Sequence[Mount], working_dir: Path) -> Path | None:
    """The path on this machine of a path that a task uses; ``None`` if its container does not mount it."""
    absolute = Path(os.path.normpath(working_dir / path.expanduser()))
    if not mounted:
        return absolute
    for mount in sorted(mounted, key=lambda mount: len(mount.inside.parts), reverse=True):
        if absolute.is_relative_to(mount.inside):
            return mount.outside / absolute.relative_to(mount.inside)
    return None
