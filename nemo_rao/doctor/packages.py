"""Versions of installed packages, read without importing them, and the plugin's requirements."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_rao.config.engine_choice import BRIDGE, BRIDGE_TESTED, NEMO

# Names of pip, in the order of the output.
SHOWN = (
    "torch",
    "nemo-toolkit",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "apex",
    "lightning",
    "nemo-run",
    "transformers",
    "nvidia-modelopt",
    "nvidia-resiliency-ext",
    "numpy",
    "vllm",
    "lm-eval",
)
PLUGIN = "nemo-rao"
# Engine -> its name and its package.
ENGINES = {NEMO: ("NeMo", "nemo-toolkit"), BRIDGE: ("Megatron-Bridge", "megatron-bridge")}


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def other_apex() -> bool:
    """Whether the package named apex is not NVIDIA's: PyPI's apex, for example, is about web logins."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return not any((folder / "optimizers").is_dir() for folder in folders)


def requirements(engine: str | None) -> list[Requirement]:
    """Return the requirements of the installed plugin with this engine, without other extras; empty if it is not
    installed as a package. Megatron-Bridge is added: it is installed without its dependencies, and so is in no extra.
    """
    try:
        asked = [Requirement(text) for text in metadata.requires(PLUGIN) or []]
    except metadata.PackageNotFoundError:
        return []
    extras = ("", engine or "")
    asked = [one for one in asked if one.marker is None or any(one.marker.evaluate({"extra": name}) for name in extras)]
    return [*asked, Requirement(f"megatron-bridge{bridge_range()}")] if engine == BRIDGE else asked


def bridge_range() -> str:
    """Return the tested releases of Megatron-Bridge as a pip specifier."""
    (first, (major, minor)) = BRIDGE_TESTED
    return f">={first[0]}.{first[1]},<{major}.{minor + 1}"


def engine_line(engine: str | None, asked: list[Requirement]) -> str | None:
    """Format the engine with its version and the tested range, or return ``None``."""
    if engine is None:
        return None
    name, package = ENGINES[engine]
    ranges = ",".join(str(one.specifier) for one in asked if canonicalize_name(one.name) == package)
    return f"{name} {version(package) or '(no metadata)'}" + (f" (tested: {ranges})" if ranges else "")


def unmet(asked: list[Requirement]) -> dict[str, str]:
    """Map the name of each unmet requirement to its problem: missing, or an unsupported version."""
    found: dict[str, str] = {}
    for one in asked:
        name, here = canonicalize_name(one.name), version(one.name)
        if here is None:
            found[name] = f"{one.name} is not installed (required: {one.specifier or 'any version'})"
        elif not one.specifier.contains(here, prereleases=True):  # a container's torch is a pre-release
            found[name] = f"{one.name} {here} is not supported by nemo_rao ({one.specifier})"
    return found
