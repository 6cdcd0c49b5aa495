"""Breakdown of an RAO step's time by kind of operation and by layout.

    python -m benchmarks.profile_step

Two steps of a run are examined. One runs under ``torch.profiler``; its operators are classified by name and by the part
of the step that called them, and their self times are summed. In the other, every call that makes the host wait for the
device is counted, with its source line: on a CPU all such calls, although nothing waits there, and on a GPU those on
tensors of the device.
"""

from __future__ import annotations

import collections
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import ModelSizes, make_inputs
from benchmarks.results import parser, write_result
from benchmarks.sessions import Session, Turn, in_child, prepare_server
from benchmarks.step import LAYOUTS, ROUNDS_OF_AN_EPOCH, Variant
from benchmarks.training import import_model, run_ours

KINDS: Mapping[str, Sequence[str]] = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"),
    "attention kernel": ("aten::_scaled_dot_product", "aten::_softmax"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy", "aten::contiguous"),
    "gather, scatter, index": ("aten::index", "aten::gather", "aten::scatter", "aten::embedding", "aten::nonzero"),
    "fill and allocate": ("aten::fill_", "aten::zero_", "aten::empty", "aten::zeros", "aten::resize"),
    "masks": ("aten::tril", "aten::triu", "aten::masked_fill", "aten::where"),
    "host waits": ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"),
    "collectives": ("gloo:", "nccl:", "c10d::"),
}
WAITS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "numpy",
    "nonzero",
    "unique",
    "equal",
)


def main() -> None:
    arguments_of = parser(__doc__, repeats=1)
    arguments_of.add_argument("--data", help="preference file; default: generated rows")
    arguments_of.add_argument("--responses", type=int, default=2, help="K")
    arguments_of.add_argument("--prompts", type=int, default=8, help="of the file, and of a step")
    arguments_of.add_argument("--micro-batches", type=int, default=2)
    arguments_of.add_argument("--max-length", type=int, default=512)
    arguments_of.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["rows", "packed+shared"])
    arguments = arguments_of.parse_args()
    arguments.batch = arguments.prompts
    prepare_server()
    profiles = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(
            Path(folder),
            ModelSizes(),
            data=arguments.data,
            num_prompts=arguments.prompts,
            numbers_of_responses=[arguments.responses],
            max_length=arguments.max_length,
            copies=ROUNDS_OF_AN_EPOCH,
        )
        in_child(import_model, inputs.source, inputs.imported)
        for layout in arguments.layouts:
            overrides = Variant("rao", layout, arguments.responses).overrides(inputs, arguments)
            args = ("gpt_rao", overrides, str(inputs.imported), (profiled,))
            session = Session(run_ours, args, steps=4, forked=True)
            profiles[layout] = session.round()["notes"]["profile"]
            session.stop()
            show(layout, profiles[layout])
    shown = {"data": Path(arguments.data).name if arguments.data else None}
    write_result("profile_step", arguments, {"layouts": profiles}, shown=shown)


def profiled(turn: Turn) -> Any:
    """A callback that profiles the third and the fourth step and records the result as ``profile``."""
    import lightning.pytorch as pl
    import torch
    from torch.profiler import ProfilerActivity, profile

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 2:
                activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
                self._profile = profile(activities=activities)
                self._profile.__enter__()
                self._start = time.perf_counter()
            if trainer.global_step == 3:
                self._waits = count_waits()
                self._waits.__enter__()

        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.global_step == 3:
                seconds = time.perf_counter() - self._start
                self._profile.__exit__(None, None, None)
                turn.notes["profile"] = by_kind(self._profile.key_averages(), seconds)
            if trainer.global_step == 4:
                self._waits.__exit__(None, None, None)
                turn.notes["profile"]["waits"] = self._waits.found()
                turn.notes["profile"]["torch_calls"] = self._waits.python_calls

    return Look()


def by_kind(averages: Any, seconds: float) -> dict[str, Any]:
    """Shares of the step's time; time outside operators is attributed to Python and the host."""
    on_device = any(event.self_device_time_total for event in averages)

    def time_of(event: Any) -> float:
        return (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6

    kinds: dict[str, float] = collections.defaultdict(float)
    operators = []
    for event in averages:
        optimizer = "Optimizer.step" in event.key
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(tuple(names))), None)
        if kind is None:
            kind = "optimizer" if optimizer or "_foreach" in event.key or "_fused_adam" in event.key else "elementwise"
            if not event.key.startswith("aten::"):
                kind = "optimizer" if optimizer else "autograd and hooks"
        kinds[kind] += time_of(event)
        operators.append({"name": event.key, "seconds": time_of(event), "calls": event.count})
    operators.sort(key=lambda one: -one["seconds"])
    kinds["Python between operators"] = max(0.0, seconds - sum(kinds.values()))
    shares = {kind: value / seconds for kind, value in sorted(kinds.items(), key=lambda item: -item[1])}
    return {"seconds": seconds, "shares": shares, "operators": operators[:40]}


def count_waits() -> Any:
    """``with count_waits() as waits: ...; waits.found()``: [{operator, line, calls}] of calls that block the host."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Count(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.python_calls = 0
            self._calls: collections.Counter[tuple[str, str]] = collections.Counter()

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.python_calls += 1
            name = getattr(func, "__name__", "")
            if name in WAITS and (args[0].is_cuda or not torch.cuda.is_available()):
                self._calls[name, _asked_by()] += 1
            return func(*args, **(kwargs or {}))

        def found(self) -> list[dict[str, Any]]:
            return [
                {"operator": name, "line": line, "calls": calls} for (name, line), calls in self._calls.most_common()
            ]

    return Count()


def _asked_by() -> str:
    """The innermost stack frame in nemo_rao, Megatron or NeMo."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("/nemo_rao/", "/megatron/", "/nemo/", "/lightning/", "/torch/optim/"):
            if package in frame.filename and "benchmarks" not in frame.filename and "cpu.py" not in frame.filename:
                return f"{package.strip('/')}/{frame.filename.split(package, 1)[1]}:{frame.lineno} {frame.line}"
    return "elsewhere"


def show(layout: str, profile: Mapping[str, Any]) -> None:
    print(f"\n{layout}: {profile['seconds']:.2f} s")
    for kind, share in profile["shares"].items():
        print(f"  {share:>6.1%}  {kind}")
    print("  operators by self time:")
    for one in profile["operators"][:25]:
        print(f"  {one['seconds'] / profile['seconds']:>6.1%} {one['calls']:>6} {one['name']}")
    print(f"  calls of torch from Python: {profile['torch_calls']}; host waits:")
    for one in profile["waits"]:
        print(f"  {one['calls']:>6} {one['operator']}  {one['line']}")


if __name__ == "__main__":
    main()
