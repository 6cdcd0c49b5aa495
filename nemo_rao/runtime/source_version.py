"""The version of the package that is running, for records and reports."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from nemo_rao import __version__


@functools.cache
def source_version() -> str:
    """Return the package's version; in a checkout also the commit, with + if files differ from it."""
    folder = Path(__file__).resolve().parents[2]
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return f"nemo-rao {__version__}"
    return f"nemo-rao {__version__}, commit {commit}{'+' if changed else ''}"


def _git(folder: Path, *words: str) -> str:
    if not (folder / ".git").exists():  # installed, perhaps inside an unrelated repository
        raise OSError
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
