"""Runs functions and trainings of GPU tests in separate processes, on the GPU or, in a dry run, on the CPU.

The test process itself does not initialize CUDA, so that its forks can.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.runtime.gpus import has_gpu, transformer_engine_is_used

from ..train.runs import _train, in_fork, run_training

ON_GPU = has_gpu()
WITH_TE = transformer_engine_is_used()
NO_TE = "Transformer Engine is not used here"
DEVICE = ("trainer.accelerator=gpu",) if ON_GPU else ("trainer.accelerator=cpu",)
ON_CPU = ("trainer.accelerator=cpu", "precision=fp32")
CPU_SECONDS = 120.0  # time limit of a run on the CPU, including imports

# A Llama whose sizes suit every FP8 recipe, with heads that fused attention supports.
SMALL = (
    *("model.arch.num_layers=3", "model.arch.hidden_size=256", "model.arch.ffn_hidden_size=512"),
    *(
        "model.arch.num_attention_heads=4",
        "model.arch.num_query_groups=2",
        "model.arch.make_vocab_size_divisible_by=128",
    ),
    *("model.seq_length=64", "model.micro_batch_size=2", "model.global_batch_size=8"),
    *("model.optim.lr=1e-4", "model.optim.sched.name=constant", "model.optim.sched.warmup_steps=0"),
    *("trainer.enable_progress_bar=false", "exp_manager.draw_curves=false"),
)


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """What ``function(*args)`` returns in a separate process; its tensors must be on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        in_fork(_store, function, args, path)
        return pickle.loads(path.read_bytes())


def _store(function: Callable[..., Any], args: Sequence[Any], path: Path) -> None:
    path.write_bytes(pickle.dumps(function(*args)))


def train(recipe: str, overrides: Sequence[str]) -> str:
    """Train on the device, in a separate process; returns what the run has printed."""
    return str(result_of(_printed, recipe, tuple(overrides)))


def _printed(recipe: str, overrides: Sequence[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _train(recipe, overrides)
    return printed.getvalue()


def enter_megatron() -> Any:
    """Initialize process groups of one rank, in a process of :func:`result_of`; returns the device."""
    import torch

    from nemo_rao.runtime.launch import _free_port, _rank_environment

    from ..mcore import tiny

    os.environ.update(_rank_environment(0, 1, _free_port()))
    if ON_GPU:
        torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl" if ON_GPU else "gloo")
    tiny.enter(tiny.Layout())
    return torch.device("cuda" if ON_GPU else "cpu")


class RunsOnTheCpu:
    """Runs ``nemo-rao train`` on the CPU, one run after the other, while tests use the GPU."""

    def __init__(self) -> None:
        self._connection: Any = None

    def start(self, recipe: str, overrides: Sequence[str]) -> Callable[[], None]:
        """Start a run after the previous ones. The function returned waits for it, and fails if the run has."""
        given = (recipe, (*overrides, *ON_CPU))
        if not ON_GPU:
            run_training(*given)
            return lambda: None
        if self._connection is None:
            self._connection, self._process = _start_server()
        self._connection.send(given)
        return self._wait

    def _wait(self) -> None:
        assert self._connection.poll(CPU_SECONDS), "timeout of a run on the CPU"
        failure = self._connection.recv()
        assert failure is None, failure

    def stop(self) -> None:
        if self._connection is not None:
            self._process.terminate()
            self._process.join()


def _start_server() -> tuple[Any, Any]:
    """A fresh interpreter without visible GPUs: the connection to it, and the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=False)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        process.start()
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return ours, process


def _serve(connection: Any) -> None:
    while True:
        recipe, overrides = connection.recv()
        try:
            run_training(recipe, overrides)
        except BaseException as error:
            connection.send(f"{type(error).__name__}: {error}")
        else:
            connection.send(None)


@contextlib.contextmanager
def synchronizations() -> Iterator[list[str]]:
    """A list that gets a line for each operation in the block at which the host waits for the GPU."""
    import torch

    found: list[str] = []
    if not ON_GPU:
        from benchmarks.profile_step import count_waits

        with count_waits() as waits:
            yield found
        found += [one["line"] for one in waits.found() for _ in range(one["calls"])]
        return
    import traceback
    import warnings

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchronizing" in str(message):
            found.append(
                " < ".join(f"{one.filename}:{one.lineno}" for one in reversed(traceback.extract_stack()[-12:-1]))
            )

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
