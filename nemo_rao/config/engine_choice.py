"""The engine of a run: ``trainer.engine``, or the installed one. Imports neither engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError

KEY = "trainer.engine"
NEMO, BRIDGE = "nemo", "bridge"  # the order in which auto tries them
# First and last release of Megatron-Bridge, (major, minor), with which the engine is tested.
BRIDGE_TESTED = ((0, 4), (0, 6))


def engine_name(config: RunConfig) -> str:
    """The run's engine.

    Raises:
        UserError: the engine is not installed, or its release is not tested.
    """
    asked = config.trainer.engine
    found = installed_engine() if asked == "auto" else asked
    if found is None:
        raise UserError(
            f"{KEY}=auto: neither NeMo's LLM collection (nemo_toolkit 2.x) nor Megatron-Bridge is installed; run make "
            "install, or use NVIDIA's container"
        )
    if not _is_installed(found):
        package = "NeMo's LLM collection (nemo_toolkit 2.x)" if found == NEMO else "Megatron-Bridge (megatron-bridge)"
        raise UserError(f"{KEY}={asked}: {package} is not installed; install it, or set {KEY}=auto")
    if found == BRIDGE:
        _check_release()
    return found


def installed_engine() -> str | None:
    """The engine that ``auto`` selects on this machine; ``None`` if none is installed, as on login nodes."""
    return next((name for name in (NEMO, BRIDGE) if _is_installed(name)), None)


def _is_installed(name: str) -> bool:
    # Other packages and later versions share the top-level name, so look for the subpackage that the engine uses.
    package, part = ("nemo", "collections/llm") if name == NEMO else ("megatron", "bridge/training")
    spec = importlib.util.find_spec(package)  # of a top-level package: imports nothing
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any((Path(folder) / part).is_dir() for folder in folders)


def _check_release() -> None:
    version = importlib.metadata.version("megatron-bridge")
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, last = BRIDGE_TESTED
    if not first <= release <= last:
        raise UserError(
            f"{KEY}={BRIDGE}: Megatron-Bridge {version} is installed, but the engine is tested with "
            f"{first[0]}.{first[1]} to {last[0]}.{last[1]}; install one of these"
        )
