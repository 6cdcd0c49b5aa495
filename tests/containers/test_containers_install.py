"""Installing the plugin into a container changes none of its packages: with pip itself, against their versions."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import packaging
import pytest

from .container import CONTAINERS, ROOT, Container, asked, default_versions, pins

runs_pip = pytest.mark.slow  # some ten times in each container

# By engine: pure Python, and needed by it rather than by the containers' other parts.
MISSING = {"nemo": ("ijson", "prettytable"), "bridge": ("defusedxml", "einops")}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("containers") / "template"
    venv.create(folder, with_pip=True, symlinks=True)
    # NVIDIA's images have it: torch and Transformer Engine are built there.
    places = next(folder.glob("lib/python*/site-packages"))
    (places / "packaging.pth").write_text(f"{link_to_packaging(folder)}\n")
    return folder


def link_to_packaging(folder: Path) -> Path:
    """A folder with nothing but this Python's package packaging."""
    place = folder / "packaging_alone"
    place.mkdir()
    (place / "packaging").symlink_to(Path(packaging.__file__).parent)
    return place


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest, template: Path, tmp_path: Path) -> Container:
    """All that the plugin requires, in the container's versions where they are known, except for two small packages."""
    made = Container(template, tmp_path / "container")
    made.engine = CONTAINERS[request.param]
    versions = {name: version for name, version in default_versions(made.engine).items() if name not in missing(made)}
    made.has({**versions, **pins(request.param)})
    return made


def missing(container: Container) -> tuple[str, str]:
    return MISSING[container.engine]


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_plugin_asks_for_no_other_version_than_a_container_has(name: str) -> None:
    known = {package.replace("-", "_"): version for package, version in pins(name).items()}
    requirements = {one: one.name.replace("-", "_") for one in asked(CONTAINERS[name])}
    assert {"torch", "megatron_core"} <= set(known) & set(requirements.values())
    refused = [
        f"{package} {known[package]}"
        for requirement, package in requirements.items()
        if package in known and not requirement.specifier.contains(known[package], prereleases=True)
    ]
    assert refused == []


def plugin_wheel(container: Container) -> Path:
    """With the requirements of both engines as extras, as pyproject.toml has them."""
    needs = [str(one) for one in asked(container.engine)]
    other = "nemo" if container.engine == "bridge" else "bridge"
    extras = [f'{one.name}{one.specifier}; extra == "{other}"' for one in asked(other)]
    return container.offers("nemo-rao", "0.1.0", needs + extras)


@runs_pip
def test_what_is_missing_is_installed_and_nothing_else_changes(container: Container) -> None:
    before = container.packages()
    for name in (*missing(container), "torch", "numpy"):  # newer ones of what is there are to be had, too
        container.offers(name, "99.0")
    done = container.install(plugin_wheel(container))
    assert done.returncode == 0, done.stdout + done.stderr
    assert container.packages() == {**before, "nemo-rao": "0.1.0", **dict.fromkeys(missing(container), "99.0")}
    assert f"the container's {len(before)} packages are unchanged" in done.stdout
    again = container.install(plugin_wheel(container))
    assert again.returncode == 0 and "nothing new" in again.stdout, again.stdout + again.stderr


@runs_pip
def test_what_would_replace_a_package_is_refused_and_nothing_changes(container: Container) -> None:
    before = container.packages()
    container.offers("torch", "99.0")
    first, second = missing(container)
    container.offers(second, "3.9")
    container.offers(first, "3.2", ["torch>=99"])
    done = container.install(plugin_wheel(container))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and first in last and "cannot be installed without changing" in last
    assert container.packages() == {**before, "nemo-rao": "0.1.0"}


@runs_pip
def test_a_version_that_the_plugin_does_not_know_stays_and_is_named(container: Container) -> None:
    for place in container.site_packages.glob("omegaconf-*.dist-info"):
        (place / "METADATA").write_text("Metadata-Version: 2.1\nName: omegaconf\nVersion: 3.0.1\n")
        place.rename(place.with_name("omegaconf-3.0.1.dist-info"))
    for name in (*missing(container), "omegaconf"):
        container.offers(name, "4.0" if name != "omegaconf" else "2.3.3")
    done = container.install(plugin_wheel(container))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: omegaconf 3.0.1 stays" in done.stdout and "<2.4" in done.stdout
    assert container.packages()["omegaconf"] == "3.0.1"


@runs_pip
def test_a_container_whose_megatron_fits_neither_engine_is_refused(template: Path, tmp_path: Path) -> None:
    container = Container(template, tmp_path / "container")
    container.has(  # 26.02
        {"torch": "2.10.0", "megatron-core": "0.16.0", "nemo-toolkit": "2.7.0", "megatron-bridge": "0.3.0"}
    )
    before = container.packages()
    done = container.install(plugin_wheel(container))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in ("megatron-core 0.16.0", "nemo-toolkit 2.7.0", "megatron-bridge 0.3.0"))
    assert container.packages() == before


@runs_pip
def test_a_python_without_an_engine_is_refused(template: Path, tmp_path: Path) -> None:
    container = Container(template, tmp_path / "container")
    before = container.packages()
    done = container.install(plugin_wheel(container))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(
        name in done.stderr for name in ("torch", "nemo-toolkit", "megatron-bridge", "megatron-core", "make install")
    )
    assert container.packages() == before


@runs_pip
def test_the_index_has_what_is_missing_without_replacing_anything(container: Container) -> None:
    """With the real packages of the index that pip is configured with."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(container.wheels), "einops"]
    reached = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if reached.returncode != 0:
        pytest.skip(f"no package index can be reached: {reached.stderr.strip().splitlines()[-1]}")
    done = container.install("--dry-run", ROOT, index=True)
    assert done.returncode == 0, done.stdout + done.stderr
    would = re.search(r"^Would install (.*)$", done.stdout, re.MULTILINE)
    assert would is not None, done.stdout
    names = {item.rpartition("-")[0].lower() for item in would[1].split()}
    assert set(missing(container)) <= names and not names & {name.lower() for name in container.packages()}
