"""A benchmark's figures as a file: where, when and with what they were measured."""

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
    """What all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="rounds that count, after one that does not")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of all ranks together")
    made.add_argument("--output", type=Path, help="JSON file; the default is committed, so that others can read it")
    return made


def write_result(
    name: str, arguments: argparse.Namespace, figures: Mapping[str, Any], *, shown: Mapping[str, Any] | None = None
) -> Path:
    """``results/NAME.json``, or where ``--output`` says.

    Args:
        shown: arguments as the file shows them, where they are other ones, such as a path that is nobody's business.
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
    """Of the repository's files, with a plus where others than results were changed since."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        # Results are what the benchmarks before this one have just written, or the page's.
        status = ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
        changed = git(*status).strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values)}
