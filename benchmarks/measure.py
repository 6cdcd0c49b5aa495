"""Peak memory of a piece of work in a separate process, times of several in turn, and the machine they ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronize() -> None:
    """Wait until the device has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The machine's processor or GPU, its threads, and versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": _versions(packages),
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of the installed packages."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


# ----------------------------------------------------------------------------------------------- memory


class PeakMemory:
    """Peak memory of a block of code, in bytes above the memory in use before it.

    On a GPU, memory given out by PyTorch's allocator. On a CPU, resident memory of the process, including buffers of
    libraries; only on Linux is the process's high-water mark reset first.

    Attributes:
        num_bytes: set when the block is left.
    """

    num_bytes = 0

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            if (reset := Path("/proc/self/clear_refs")).exists():
                reset.write_text("5")
            self._before = _resident("VmRSS")
        return self

    def so_far(self) -> int:
        """Bytes, inside the block."""
        synchronize()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
        return peak - self._before

    def __exit__(self, *_: object) -> None:
        self.num_bytes = self.so_far()


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # macOS: only the process's peak is available, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------- time


def times_in_turn(
    work: Mapping[str, Callable[[], Mapping[str, float]]], *, repeats: int, warm_up: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Run each piece of work in turn, A B C A B C ..., so that a slow phase of the machine affects all of them.

    Args:
        work: name -> a function that runs once and returns seconds by phase.

    Returns:
        name -> one entry for each of ``repeats`` rounds, without warm-up rounds.
    """
    rounds = [{name: dict(run()) for name, run in work.items()} for _ in range(warm_up + repeats)]
    return {name: [seconds[name] for seconds in rounds[warm_up:]] for name in work}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Ratios of runs of the same round: the median, and those of the two fastest runs (``of_minima``)."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "of_minima": min(numerator) / min(denominator)}


def clock() -> float:
    """Seconds, once the device is idle."""
    synchronize()
    return time.perf_counter()


# ------------------------------------------------------------------------------------------------ ranks


def on_ranks(function: Callable[..., Any], arguments: Sequence[Any], *, num_ranks: int, threads: int) -> Any:
    """Run ``function(*arguments)`` in new processes that form the default process group; return rank 0's result.

    Args:
        threads: total number; each rank gets its share, at least one.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(num_ranks) as pool:
        results = pool.starmap(
            _rank,
            [(function, arguments, rank, num_ranks, max(1, threads // num_ranks), folder) for rank in range(num_ranks)],
            chunksize=1,
        )
    return results[0]


def _rank(
    function: Callable[..., Any], arguments: Sequence[Any], rank: int, num_ranks: int, threads: int, folder: str
) -> Any:
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
