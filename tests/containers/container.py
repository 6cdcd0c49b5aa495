"""A Python environment with a container's packages as pip sees them: names and versions, without code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = {"26.06": "bridge", "26.04": "bridge", "25.11": "nemo", "25.09": "nemo"}  # -> the extra of its engine


def pins(container: str) -> dict[str, str]:
    """Name -> version, of containers/constraints-NAME.txt."""
    lines = (ROOT / f"containers/constraints-{container}.txt").read_text().splitlines()
    pairs = [line.partition("==") for line in lines if not line.startswith("#")]
    return {name: version for name, _, version in pairs}


def asked(engine: str) -> list[Requirement]:
    """What pyproject.toml requires with an engine."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"][engine]]]


def default_versions(engine: str) -> dict[str, str]:
    """The lowest allowed version, for packages whose version in the container is not known."""
    found: dict[str, Version] = {}
    for one in asked(engine):
        lowest = [Version(part.version) for part in one.specifier if part.operator == ">="]
        name = one.name.replace("_", "-")
        found[name] = max([*lowest, found.get(name, Version("0.1"))])
    return {name: str(version) for name, version in found.items()}


class Container:
    """A virtual environment with pip, and packages that consist of their metadata.

    Attributes:
        engine: the extra of the engine that the container is for.
    """

    engine = "nemo"

    def __init__(self, template: Path, folder: Path) -> None:
        shutil.copytree(template, folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin/python"
        self.site_packages = next(folder.glob("lib/python*/site-packages"))
        self.wheels = folder / "wheels"
        self.wheels.mkdir()

    def has(self, packages: Mapping[str, str]) -> None:
        for name, version in packages.items():
            info = self.site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(metadata_text(name, version))
            (info / "INSTALLER").write_text("pip\n")
            (info / "RECORD").write_text("")

    def offers(self, name: str, version: str, needs: Sequence[str] = ()) -> Path:
        """Add a wheel to the only directory that pip searches."""
        stem = f"{name.replace('-', '_')}-{version}"
        path = self.wheels / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", metadata_text(name, version, needs))
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
        return path

    def install(self, *arguments: str | Path, index: bool = False) -> subprocess.CompletedProcess[str]:
        """containers/install.py, with the wheels that are offered or with pip's own index."""
        offline = {} if index else {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return subprocess.run(
            [self.python, ROOT / "containers/install.py", *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env={**{name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}, **offline},
            timeout=240,
        )

    def packages(self) -> dict[str, str]:
        """Name -> version, as pip lists them."""
        command = [self.python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return {name: version for name, _, version in (line.partition("==") for line in listed.splitlines())}


def metadata_text(name: str, version: str, needs: Sequence[str] = ()) -> str:
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    return head + "".join(f"Requires-Dist: {one}\n" for one in needs)
