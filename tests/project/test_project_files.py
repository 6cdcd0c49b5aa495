"""Versions that are written in several files are the same everywhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from nemo_rao import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    return loaded


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return loaded


def test_the_changelog_begins_with_the_packages_version_and_the_citation_has_it() -> None:
    assert project()["dynamic"] == ["version"], "it is in nemo_rao/__init__.py alone"
    first = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_pre_commit_runs_the_pinned_versions() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    needed = [
        one for repo in config["repos"] for hook in repo["hooks"] for one in hook.get("additional_dependencies", ())
    ]
    assert len(needed) >= 4 and set(needed) <= set(pinned)


def test_continuous_integration_tests_every_python_that_the_package_declares() -> None:
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    tested = workflow()["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [one["python"] for one in tested if one["engine"] == "nemo"] == declared
    assert {one["engine"] for one in tested} == {"nemo", "bridge"}


def test_continuous_integration_runs_targets_that_the_makefile_has() -> None:
    def commands() -> Iterator[str]:
        for job in workflow()["jobs"].values():
            yield from (step["run"] for step in job["steps"] if "run" in step)

    used = {target for command in commands() for target in re.findall(r"\bmake ([\w-]+)", command)}
    defined = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "install", "wheel"} <= used <= defined | {"docs"}
