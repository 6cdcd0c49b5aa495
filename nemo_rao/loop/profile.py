"""Profiles of training steps: PyTorch's trace, a snapshot of the GPU's memory, ranges for NVIDIA's Nsight Systems.

    RUN/profile/trace_steps_10_to_12.json.gz      for ui.perfetto.dev or chrome://tracing
    RUN/profile/memory_steps_10_to_12.pickle      for pytorch.org/memory_viz, on a GPU

Under ``nsys profile --capture-range=cudaProfilerApi``, Nsight Systems records these steps instead of PyTorch's trace:
the two profilers cannot read the GPU's counters at the same time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nemo_rao.batch import MicroBatch
from nemo_rao.loop.session import Hook, Session
from nemo_rao.runtime.console import say

FOLDER = "profile"  # in the run's directory
_NSIGHT = "NSYS_PROFILING_SESSION_ID"  # environment variable that nsys sets for its child processes
_MEMORY_EVENTS = 200_000  # maximum allocations in a snapshot


class ProfileSteps(Hook):
    """Profiles steps on the first rank. Must be the last hook, so that it excludes the others' ``before_step``.

    Args:
        first, last: first and last step, counted from 1 as in ``metrics.jsonl``. A run that starts or ends between
            them profiles the steps that it takes.
    """

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._profiler: Any = None
        self._is_running = False
        self._micro_batches = 0

    def before_step(self, session: Session) -> None:
        number = session.step + 1
        if session.is_first_rank and not self._is_running and self._first <= number <= self._last:
            self._begin()
        if self._is_running:
            self._micro_batches = 0
            torch.cuda.nvtx.range_push(f"step {number}")
            self._step = record_function(f"step {number}")  # the range of PyTorch's trace
            self._step.__enter__()

    def micro_batch(self, session: Session, batch: MicroBatch, *, embeds_tokens: bool) -> None:
        if self._is_running and embeds_tokens:
            self._micro_batches += 1
            torch.cuda.nvtx.mark(f"micro-batch {self._micro_batches}")

    def after_step(self, session: Session) -> None:
        if not self._is_running:
            return
        self._step.__exit__(None, None, None)
        torch.cuda.nvtx.range_pop()
        if session.step >= self._last:
            self._finish(session)

    def end(self, session: Session) -> None:
        if self._is_running:
            self._finish(session)

    def _begin(self) -> None:
        self._is_running = True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            torch.cuda.profiler.start()
        if _NSIGHT not in os.environ:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities, profile_memory=True, with_stack=True)
            self._profiler.start()

    def _finish(self, session: Session) -> None:
        self._is_running = False
        folder: Path = session.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        steps = f"steps_{self._first}_to_{min(self._last, session.step)}"
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(folder / f"trace_{steps}.json.gz"))
            self._profiler = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_{steps}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        say(f"profile      {folder}")
