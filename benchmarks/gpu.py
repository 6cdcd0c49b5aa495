"""Tests and benchmarks that need a GPU, in one command. docs/gpu.md describes the parts.

    make gpu                                 # or python -m benchmarks.gpu; under 7 minutes on an H100
    python -m benchmarks.gpu --parts steps,fp8
    python -m benchmarks.gpu --dry-run       # all parts on the CPU, at toy size
    make gpu-page                            # docs/gpu.md from the results

The parts run in order of importance, each with a time limit. A part's result is one file, NAME.json, written when the
part starts and again when it ends; a part that is stopped keeps its measurements so far. Exit code: 0 if all chosen
parts have run and passed.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.gpu_parts import PARTS, RESULTS, Part
from benchmarks.measure import environment
from benchmarks.results import GPU_PACKAGES, commit
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.gpus import has_gpu

REPOSITORY = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
MINIMUM_SECONDS = 15.0  # no part is started with less time left
TAIL = 20_000  # characters of a part's output that are kept
DRY_RUN_LIMIT = 600.0  # seconds of a part; a CPU may be busy


def run_part(part: Part, folder: Path, *, about: Mapping[str, Any], dry_run: bool, limit: float) -> dict[str, Any]:
    """Run a part and write its result, which is returned.

    Args:
        folder: of the results.
        about: fields of every result.
        limit: seconds after which the part is stopped.
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
    """The command's exit code; ``None`` if it and its child processes were stopped at the limit."""
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
            continue  # it has ended: remaining child processes are killed at once
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)


def main(given: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--parts", default=",".join(names), help="comma-separated, run in this order: %(default)s")
    command.add_argument(
        "--output",
        type=Path,
        help="directory of the results; the default is $OUT/gpu if OUT is set, else benchmarks/results/gpu, and a "
        "temporary directory for a dry run",
    )
    command.add_argument("--dry-run", action="store_true", help="run on the CPU, at toy size")
    command.add_argument("--seconds", type=float, default=480.0, help="time limit of all parts together; %(default)g")
    command.add_argument("--commit", help="commit to record, if git is not available")
    arguments = command.parse_args(given)
    chosen = arguments.parts.split(",")
    if unknown := [name for name in chosen if name not in names]:
        command.error(f"--parts {','.join(unknown)}: unknown; choose from {', '.join(names)}")
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not has_gpu():
        command.error("no CUDA device found; --dry-run runs everything on the CPU at toy size")
    folder = arguments.output or _default_folder(dry_run=arguments.dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the part's processes
    about = {
        **environment(GPU_PACKAGES),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": arguments.commit or commit(),
        "dry_run": arguments.dry_run,
    }
    end = time.monotonic() + (arguments.seconds if not arguments.dry_run else float("inf"))
    statuses = []
    for part in PARTS:
        if part.name not in chosen:
            continue
        limit = min(DRY_RUN_LIMIT if arguments.dry_run else part.limit, end - time.monotonic())
        if limit < MINIMUM_SECONDS:
            print(f"{part.name}: not started, --seconds {arguments.seconds:g} are over", flush=True)
            statuses.append("not started")
            continue
        print(f"{time.strftime('%X')} {part.name}", flush=True)
        report = run_part(part, folder, about=about, dry_run=arguments.dry_run, limit=limit)
        statuses.append(report["status"])
        if report["status"] != "ok":
            print(report.get("reason") or report["output"][-3000:], flush=True)
        print(f"{time.strftime('%X')} {part.name}: {report['status']}, {report['seconds']:.0f} s", flush=True)
    print(page(folder), flush=True)
    print(f"written to {folder}", flush=True)
    return 0 if all(status == "ok" for status in statuses) else 1


def _default_folder(*, dry_run: bool) -> Path:
    if dry_run:
        return Path(tempfile.mkdtemp(prefix="nemo_rao_gpu_"))
    return Path(os.environ["OUT"]) / "gpu" if os.environ.get("OUT") else RESULTS


if __name__ == "__main__":
    raise SystemExit(main())
