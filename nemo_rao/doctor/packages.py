"""Versions of what is installed, read without importing it, and what the plugin asks of them."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# As pip names them, in the order in which they are printed.
SHOWN = (
    "torch",
    "nemo-toolkit",
    "megatron-core",
    "transformer-engine",
    "apex",
    "lightning",
    "nemo-run",
    "transformers",
    "nvidia-modelopt",
    "numpy",
    "vllm",
    "lm-eval",
)
PLUGIN = "nemo-rao"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def other_apex() -> bool:
    """Whether the package named apex is not NVIDIA's: PyPI's of that name, for one, is about web logins."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return not any((folder / "optimizers").is_dir() for folder in folders)


def requirements() -> list[Requirement]:
    """What the installed plugin asks for, extras left out; nothing where it is not installed as a package."""
    try:
        asked = [Requirement(text) for text in metadata.requires(PLUGIN) or []]
    except metadata.PackageNotFoundError:
        return []
    return [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]


def unmet(asked: list[Requirement]) -> dict[str, str]:
    """Name -> what is wrong with it: missing, or a version that the plugin does not know."""
    found = {}
    for one in asked:
        here = version(one.name)
        if here is None:
            found[one.name] = f"{one.name} is not installed (asked for: {one.specifier or 'any version'})"
        elif not one.specifier.contains(here, prereleases=True):  # a container's torch is a pre-release
            found[one.name] = f"{one.name} {here} is not among the versions that work with nemo_rao ({one.specifier})"
    return found
