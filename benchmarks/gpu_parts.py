"""The parts of ``make gpu``: their commands, time limits, and how their figures are read."""

from __future__ import annotations

import dataclasses
import json
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

RESULTS = FOLDER / "gpu"

# The file that a part writes -> its figures.
Read = Callable[[Path], dict[str, Any]]


def read_json(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def read_tests(path: Path) -> dict[str, Any]:
    """Outcome, seconds and message of each test, from pytest's JUnit report."""
    tests = {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        outcome, message = "passed", ""
        for kind in ("skipped", "error", "failure"):  # the last one found counts
            if (found := case.find(kind)) is not None:
                outcome, message = kind, (found.get("message") or found.text or "").strip()[:1500]
        name = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        tests[name] = {"outcome": outcome, "seconds": float(case.get("time") or 0), "message": message}
    outcomes = [test["outcome"] for test in tests.values()]
    return {"counts": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}, "tests": tests}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of the part and its result.
        shows: description, in Markdown.
        limit: seconds after which the part is stopped.
        command: arguments of Python; ``{output}`` stands for the file that the part writes.
        on_gpu, dry: further arguments on a GPU and in a dry run.
        read: reads the figures from that file.
        needs: packages without which it cannot run.
    """

    name: str
    shows: str
    limit: float
    command: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    read: Read = read_json
    needs: tuple[str, ...] = ()

    def arguments(self, output: Path, *, dry_run: bool) -> list[str]:
        further = self.dry if dry_run else self.on_gpu
        return [sys.executable, *(word.replace("{output}", str(output)) for word in (*self.command, *further))]


def _steps(name: str, shows: str, limit: float) -> Part:
    command = ("-W", "ignore", "-m", "benchmarks.gpu_steps", name, "--output", "{output}")
    return Part(name, shows, limit, command, dry=("--dry-run",))


# Llama 3's head over a packed batch, and a toy.
_HEAD = ("--tokens", "8192", "32768", "--hidden", "4096", "--vocab", "128256", "--tp", "1", "--dtype", "bfloat16")
_TOY_HEAD = ("--tokens", "32", "--hidden", "32", "--vocab", "256", "--tp", "1", "--dtype", "bfloat16")

PARTS = (  # the most important first
    Part(
        "doctor",
        "the installation, as `nemo-rao doctor` reports it",
        25,
        ("-m", "nemo_rao.cli", "doctor", "--json", "{output}"),
    ),
    Part(
        "tests",
        "`pytest -m gpu`: Transformer Engine's layers against PyTorch's and transformers', bf16 and FP8 against fp32, "
        "resumption, checkpoints that move between CPU and GPU, sampling, no synchronization with the host within a "
        "step",
        150,
        ("-m", "pytest", "-q", "-m", "gpu", "--junitxml", "{output}", "-p", "no:cacheprovider", "tests/gpu"),
        dry=("--gpu-dry-run",),
        read=read_tests,
        needs=("pytest",),
    ),
    Part(
        "log_probs",
        "time and memory of the output layer's log-probabilities at Llama 3's head",
        45,
        ("-m", "benchmarks.log_probs", "--output", "{output}"),
        on_gpu=(*_HEAD, "--repeats", "5"),
        dry=(*_TOY_HEAD, "--repeats", "1", "--one-process"),
    ),
    _steps("steps", "RAO and SFT steps in bf16: MFU, and peak memory against `nemo-rao plan`", 60),
    _steps("fp8", "RAO steps in each FP8 recipe against bf16", 80),
    _steps("prefix_sharing", "RAO steps with shared prompts against packed rows", 55),
)
