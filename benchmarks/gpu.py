"""Everything that only a GPU can show, in one command, the most important first, each part within its own seconds.

    make gpu                                 # or python -m benchmarks.gpu; under 7 minutes on an H100
    python -m benchmarks.gpu --parts steps,fp8
    python -m benchmarks.gpu --dry-run       # all of it on the CPU, at toy size
    make gpu-page                            # docs/gpu.md from the results

    doctor            nemo-rao doctor
    tests             pytest -m gpu
    log_probs         the output layer's log-probabilities (benchmarks/log_probs.py)
    steps             RAO beside SFT in bf16: seconds, MFU, peak memory beside the planner's (benchmarks/gpu_steps.py)
    fp8               RAO in each FP8 recipe beside bf16
    prefix_sharing    packed rows with shared prompts beside packed rows

Each part's result is one file, NAME.json, written when the part begins and again when it ends, in --output:
$OUT/gpu where OUT is set, else benchmarks/results/gpu. What a part that is stopped has measured so far is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import environment
from benchmarks.results import FOLDER, GPU_PACKAGES, commit
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.gpus import has_gpu

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = FOLDER / "gpu"
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MINIMUM_SECONDS = 15.0  # in which a part could show something
TAIL = 20_000  # characters of a part's output that are kept

# What a part's command was given -> its figures.
Read = Callable[[Path], dict[str, Any]]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _read_tests(path: Path) -> dict[str, Any]:
    """Outcome, seconds and message of each test, from pytest's JUnit report."""
    tests = {}
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        [(outcome, message)] = [
            (kind, (found.get("message") or found.text or "").strip()[:1500])
            for kind in ("failure", "error", "skipped")
            if (found := case.find(kind)) is not None
        ][:1] or [("passed", "")]
        name = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        tests[name] = {"outcome": outcome, "seconds": float(case.get("time") or 0), "message": message}
    outcomes = [test["outcome"] for test in tests.values()]
    return {"counts": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}, "tests": tests}


@dataclasses.dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: by which it is chosen, and of its result.
        limit: seconds, after which it is stopped.
        command: arguments of Python, ``{output}`` for the file that it writes.
        on_gpu, dry: further ones, on a GPU and in a dry run.
        read: the file that it writes -> its figures.
        needs: packages without which it cannot run.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    on_gpu: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    read: Read = _read_json
    needs: tuple[str, ...] = ()

    def arguments(self, output: Path, *, dry_run: bool) -> list[str]:
        further = self.dry if dry_run else self.on_gpu
        return [sys.executable, *(word.replace("{output}", str(output)) for word in (*self.command, *further))]


# Llama 3's head over a packed batch, and a toy.
_HEAD = ("--tokens", "8192", "32768", "--hidden", "4096", "--vocab", "128256", "--tp", "1", "--dtype", "bfloat16")
_TOY_HEAD = ("--tokens", "32", "--hidden", "32", "--vocab", "256", "--tp", "1", "--dtype", "bfloat16")
_STEPS = ("-W", "ignore", "-m", "benchmarks.gpu_steps")

PARTS = (
    Part("doctor", 25, ("-m", "nemo_rao.cli", "doctor", "--json", "{output}")),
    Part(
        "tests",
        150,
        ("-m", "pytest", "-q", "-m", "gpu", "--junitxml", "{output}", "-p", "no:cacheprovider", "tests/gpu"),
        dry=("--gpu-dry-run",),
        read=_read_tests,
        needs=("pytest",),
    ),
    Part(
        "log_probs",
        45,
        ("-m", "benchmarks.log_probs", "--output", "{output}"),
        on_gpu=(*_HEAD, "--repeats", "5"),
        dry=(*_TOY_HEAD, "--repeats", "1"),
    ),
    *(
        Part(name, limit, (*_STEPS, name, "--output", "{output}"), dry=("--dry-run",))
        for name, limit in (("steps", 60), ("fp8", 80), ("prefix_sharing", 55))
    ),
)
DRY_RUN_LIMIT = 600.0  # seconds of a part: a CPU has few cores, and others may use them


def run_part(part: Part, folder: Path, *, about: Mapping[str, Any], dry_run: bool, limit: float) -> dict[str, Any]:
    """Run a part and write its result, first without figures.

    Args:
        folder: of results.
        about: what all results hold.
        limit: seconds.
    """
    result = folder / f"{part.name}.json"
    partial = folder / f"{part.name}.partial"
    command = part.arguments(partial, dry_run=dry_run)
    report: dict[str, Any] = {"part": part.name, **about, "limit_seconds": limit, "status": "running"}

    def write() -> None:
        write_atomically(result, json.dumps(report, indent=2) + "\n")

    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        report |= {"status": "unavailable", "reason": f"{', '.join(missing)} is not installed", "seconds": 0.0}
        write()
        return report
    write()
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        report["status"] = "stopped"  # by a signal
        try:
            code = _run(command, output, limit)
            report["status"] = "timed out" if code is None else "ok" if code == 0 else "failed"
            report["exit_code"] = code
        finally:
            report["seconds"] = round(time.monotonic() - start, 1)
            output.seek(0)
            report["output"] = output.read()[-TAIL:]
            if partial.exists():
                with contextlib.suppress(ValueError, xml.etree.ElementTree.ParseError):  # stopped while it was written
                    report["figures"] = part.read(partial)
                partial.unlink()
            write()
    return report


def _run(command: Sequence[str], output: Any, limit: float) -> int | None:
    """Exit code; ``None`` if it was stopped, with all that it had started."""
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[Any]) -> None:
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is not None and number == signal.SIGTERM:
            continue  # it has ended by itself; what it has left behind does not deserve a warning
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def main(given: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--parts", default=",".join(names), help=f"of {', '.join(names)}; in the order of this list")
    command.add_argument("--output", type=Path, help="directory of the results")
    command.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size, into a temporary directory")
    command.add_argument("--seconds", type=float, default=480.0, help="after which no part is begun or goes on")
    command.add_argument("--commit", help="of these files, where git is not there to be asked")
    arguments = command.parse_args(given)
    chosen = arguments.parts.split(",")
    if unknown := [name for name in chosen if name not in names]:
        command.error(f"--parts {','.join(unknown)}: there are {', '.join(names)}")
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        command.error("this machine has no CUDA device; --dry-run runs everything on the CPU at toy size")
    folder = arguments.output or _default_folder(dry_run=arguments.dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part's processes, too
    about = {
        **environment(GPU_PACKAGES),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": arguments.commit or commit(),
        "dry_run": arguments.dry_run,
    }
    end = time.monotonic() + (arguments.seconds if not arguments.dry_run else float("inf"))
    reports = []
    for part in PARTS:
        if part.name not in chosen:
            continue
        limit = min(DRY_RUN_LIMIT if arguments.dry_run else part.limit, end - time.monotonic())
        if limit < MINIMUM_SECONDS:
            print(f"{part.name:<16} not begun: --seconds {arguments.seconds:g} are over", flush=True)
            continue
        print(f"{time.strftime('%X')} {part.name}", flush=True)
        report = run_part(part, folder, about=about, dry_run=arguments.dry_run, limit=limit)
        reports.append(report)
        if report["status"] != "ok":
            print(report.get("reason") or report["output"][-3000:], flush=True)
        print(f"{time.strftime('%X')} {part.name}: {report['status']}, {report['seconds']:.0f} s", flush=True)
    _show_page(folder)
    print(f"written to {folder}", flush=True)
    return 0 if all(report["status"] == "ok" for report in reports) else 1


def _default_folder(*, dry_run: bool) -> Path:
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="nemo_rao_gpu_"))
    return Path(os.environ["OUT"]) / "gpu" if os.environ.get("OUT") else RESULTS


def _show_page(folder: Path) -> None:
    from benchmarks.gpu_page import page

    print(page(folder), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
