"""Imports in child processes: failures, hangs and crashes are reported in one line each."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nemo_rao.doctor.inside import PROBES

# With exactly this process's search path, so that it finds what a run would find.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nemo_rao.doctor.inside import main; main(sys.argv[2])"
)
_LONGEST = 240  # characters of an error
_AT_ONCE = 4


@dataclass(frozen=True)
class Probe:
    """The outcome of an import.

    Attributes:
        error: why it failed, in one line; ``None`` if it succeeded.
        installed: whether the package is installed.
        facts: facts reported by :mod:`nemo_rao.doctor.inside`.
    """

    error: str | None
    installed: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.error is None


def probe_all(names: Collection[str], *, timeout: float) -> dict[str, Probe]:
    """Run the named probes, a few at a time; ``timeout``: seconds for each."""
    with ThreadPoolExecutor(max_workers=max(1, min(_AT_ONCE, os.cpu_count() or 1))) as pool:
        return dict(zip(names, pool.map(lambda name: probe(name, timeout=timeout), names), strict=True))


def probe(name: str, *, timeout: float) -> Probe:
    """Run one of :data:`nemo_rao.doctor.inside.PROBES`."""
    if importlib.util.find_spec(PROBES[name][1]) is None:  # imports nothing for a top-level package
        return Probe("not installed", installed=False)
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        return Probe(f"not imported within {timeout:g} seconds")
    if done.returncode != 0 or not done.stdout:
        return Probe(_shortened(_ended(done.returncode, done.stderr)))
    result = json.loads(done.stdout)
    return Probe(_shortened(result["error"])) if "error" in result else Probe(None, facts=result["facts"])


def _ended(code: int, stderr: str) -> str:
    """Describe the end of a process that could not report an error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return f"{what}: {lines[-1]}" if lines else what


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
