"""Install nemo_rao into one of NVIDIA's NeMo containers without changing any of its packages.

    python containers/install.py [--dry-run] [SOURCE]

SOURCE is the repository (default: that of this file) or a wheel. The plugin is installed without its dependencies.
Missing dependencies of the plugin and of the container's engine (NeMo 2 up to 25.11, Megatron-Bridge from 26.04) are
then installed with every package of the container pinned to its version. A package whose version is outside the
plugin's range is kept and reported. Finally, the packages are compared with those at the start.

Exit codes: 0, installed; 1, a package changed, or a missing one cannot be installed without changing another; 2, this
is not such a container, or its megatron-core works with neither engine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PLUGIN = "nemo-rao"
# Built for each other and for the container's CUDA: never from an index.
CONTAINERS_OWN = ("torch", "megatron-core")
# Extra -> the engine's package, and the supported releases of megatron-core: from the first, below the second.
# Containers of 2025 have both packages, but their Bridge is too old.
ENGINES = {"nemo": ("nemo-toolkit", "0.14", "0.16"), "bridge": ("megatron-bridge", "0.17", "0.20")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install nemo_rao into NVIDIA's NeMo container.", allow_abbrev=False)
    parser.add_argument("source", nargs="?", default=str(Path(__file__).resolve().parents[1]), metavar="SOURCE")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="install nothing; list the missing dependencies of SOURCE, a repository",
    )
    given = parser.parse_args(argv)
    before = installed()
    absent = [name for name in CONTAINERS_OWN if name not in before]
    if not any(package in before for package, _, _ in ENGINES.values()):
        absent.append(" and ".join(package for package, _, _ in ENGINES.values()))
    if absent:
        return tell(
            f"{', '.join(absent)} not found by {sys.executable}: this is not one of NVIDIA's NeMo containers, or not "
            "its Python; elsewhere `make install` installs nemo_rao",
            2,
        )
    engine = engine_of(before)
    if engine is None:
        here = ", ".join(f"{name} {before[name]}" for name, _, _ in ENGINES.values() if name in before)
        return tell(
            f"megatron-core {before['megatron-core']} works with none of the installed engines ({here}); use a "
            "container that docs/guides/containers.md lists",
            2,
        )
    if not given.dry_run and pip("--no-deps", given.source):
        return tell(f"pip could not install {given.source}; see its message above", 1)
    missing, unknown = needs(given.source if given.dry_run else None, engine, before)
    for line in unknown:
        print(f"note: {line}")
    if missing and install_missing(missing, before, given.dry_run):
        return tell(
            f"{', '.join(missing)}: cannot be installed without changing the container's packages; see pip's message "
            "above",
            1,
        )
    after = installed()
    changed = [
        f"{name} {old} -> {after.get(name, 'removed')}"
        for name, old in before.items()
        if after.get(name) != old and name != PLUGIN
    ]
    if changed:
        return tell(f"the container's packages changed: {'; '.join(changed)}", 1)
    new = [f"{name} {version}" for name, version in after.items() if name not in before]
    print(f"installed: {', '.join(new) or 'nothing new'}; the container's {len(before)} packages are unchanged")
    return 0


def tell(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code


def installed() -> dict[str, str]:
    """Name -> version of every package that this Python finds; of several copies, the first on its path."""
    importlib.invalidate_caches()  # pip may have installed packages
    found: dict[str, str] = {}
    for one in metadata.distributions():
        if one.metadata["Name"]:  # damaged distributions have none
            found.setdefault(canonicalize_name(one.metadata["Name"]), one.version)
    return found


def engine_of(there: dict[str, str]) -> str | None:
    """The extra of the engine that works with the container's megatron-core, or ``None``."""
    # A development release counts as its release: 0.17.0rc0 has the interfaces of 0.17.
    release = Version(Version(there["megatron-core"]).base_version)
    for engine, (package, first, before) in ENGINES.items():
        if package in there and Version(first) <= release < Version(before):
            return engine
    return None


def needs(source: str | None, engine: str, there: dict[str, str]) -> tuple[list[str], list[str]]:
    """Missing requirements of the plugin, and lines about those present in an unsupported version.

    Args:
        source: a repository that is not installed yet; ``None``: read the metadata of the installed plugin.
        engine: the extra whose requirements are included.
    """
    if source is None:
        texts = metadata.requires(PLUGIN) or []
    else:
        import tomllib

        project = tomllib.loads((Path(source) / "pyproject.toml").read_text())["project"]
        texts = [*project["dependencies"], *project["optional-dependencies"][engine]]
    asked = [Requirement(text) for text in texts]
    asked = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": engine})]
    missing, unknown = [], []
    for one in asked:
        here = there.get(canonicalize_name(one.name))
        if here is None:
            missing.append(f"{one.name}{one.specifier}")
        elif not one.specifier.contains(here, prereleases=True):  # the container's torch is a pre-release
            unknown.append(f"{one.name} {here} stays, though nemo_rao is known to work with {one.specifier} only")
    return missing, unknown


def install_missing(missing: list[str], before: dict[str, str], dry_run: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in before.items() if is_valid(version)))
        return pip(*(["--dry-run"] if dry_run else []), "--constraint", str(constraints), *missing)


def is_valid(version: str) -> bool:
    """Whether pip accepts the version in a constraint."""
    try:
        Version(version)
    except InvalidVersion:
        return False
    return True


def pip(*arguments: str) -> int:
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}).returncode


if __name__ == "__main__":
    sys.exit(main())
