"""Result files of benchmarks: the figures, and the machine, date and versions with which they were measured."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "nemo-toolkit", "megatron-core", "transformers", "trl")
GPU_PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "nemo-toolkit", "megatron-bridge")


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Arguments of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="measured rounds, after one warm-up round")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="total CPU threads of all ranks")
    made.add_argument("--output", type=Path, help="JSON file; the default is a file of the repository")
    return made


def write_result(
    name: str, arguments: argparse.Namespace, figures: Mapping[str, Any], *, shown: Mapping[str, Any] | None = None
) -> Path:
    """Write ``results/NAME.json``, or the file given by ``--output``.

    Args:
        shown: arguments to record instead of the actual ones, such as a private path.
    """
    path = arguments.output or FOLDER / f"{name}.json"
    given = {key: value for key, value in vars(arguments).items() if key != "output"} | dict(shown or {})
    report = {
        "benchmark": name,
        **environment(PACKAGES),
        "threads": arguments.threads,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "arguments": given,
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {path}", flush=True)
    return path


def commit() -> str:
    """The repository's commit, with a plus if files other than results have been changed since."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        # Results may have just been written by the preceding benchmarks, or by the page.
        status = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
        changed = git(*status).strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values)}
