"""A step's numbers, in training and validation: reduced over all ranks, and reported under the step they belong to.

The step axis is one: optimizer steps done. It is that of ``metrics.jsonl``, of every logger, of checkpoints' names and
of the metric by which they are ranked. NeMo and Lightning, left to themselves, log some numbers too, under a count of
their own; the trainer is told to log nothing (``log_every_n_steps=0``).
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_rao.batch import MicroBatch
from nemo_rao.engines.nemo.callbacks import model_chunks
from nemo_rao.engines.nemo.data_module import AlignmentData
from nemo_rao.engines.nemo.model import AlignmentLossReduction
from nemo_rao.mcore.evaluate import evaluate
from nemo_rao.mcore.loss import means, reduce_statistics
from nemo_rao.mcore.mismatched import mean_log_ratio
from nemo_rao.runtime.metrics_file import append_metrics, truncate_metrics


class StepLog:
    """Where numbers go: loggers, ``metrics.jsonl`` of the run folder, and ``trainer.callback_metrics``.

    The last is what a checkpoint's monitor and the progress bar read. It has nothing of earlier steps.

    Args:
        path: of ``metrics.jsonl``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._step = -1
        self._names: set[str] = set()  # that callback_metrics have of that step

    def __call__(self, trainer: pl.Trainer, values: Mapping[str, float], *, to_loggers: bool = True) -> None:
        """Report numbers, the same on every rank, of the optimizer steps done so far."""
        # Not by log_dict, which takes about a millisecond for each number.
        metrics = trainer.callback_metrics
        if trainer.global_step != self._step:
            for name in self._names:
                metrics.pop(name, None)
            self._step, self._names = trainer.global_step, set()
        metrics.update({name: torch.tensor(value) for name, value in values.items()})
        self._names.update(values)
        if to_loggers:
            for logger in trainer.loggers:
                logger.log_metrics(dict(values), step=trainer.global_step)
        if trainer.is_global_zero:
            append_metrics(self._path, {"step": trainer.global_step, **values})

    def truncate(self, last_step: int) -> None:
        """Drop the file's lines of later steps: they are computed again. On one rank."""
        truncate_metrics(self._path, last_step)


class Metrics(pl.Callback):
    """Reduces a step's statistics over the whole global batch and logs them, on every rank alike.

    Beside the objective's own:

        tokens_per_second        of the batch's rows, prompt and response, whatever the layout; over all ranks
        data/token_efficiency    tokens that were computed, over those with padding
        data/tokens_shared       fraction of the rows' tokens that was not computed, as prompts were shared

    A resumed run first drops the lines of steps that it computes again. At the end, rank 0 writes each rank's peak
    memory to ``memory.json``, in bytes: of the GPU, or of the process where there is none, what it shares with the
    other ranks included.

    Args:
        folder: the run folder.
        log: where the numbers go.
        log_every_n_steps: steps from one line of the loggers to the next; ``metrics.jsonl`` has every step.
    """

    def __init__(self, folder: Path, log: StepLog, *, log_every_n_steps: int) -> None:
        self._folder = folder
        self._log = log
        self._log_every_n_steps = log_every_n_steps
        self._step_started = 0.0
        self._tokens = np.zeros(3)
        self._names: list[str] = []  # of the objective's statistics, since they were first seen
        self._latest: dict[str, float] = {}
        self._tokens_of_rows = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._log.truncate(trainer.global_step or -1)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()
        self._tokens = np.zeros(3)

    def on_megatron_microbatch_start(
        self, step: MegatronStep, batch: MicroBatch, forward_callback: AlignmentLossReduction
    ) -> None:
        # Counted once: by the chunk that embeds the tokens, on one of the ranks that have them.
        if forward_callback.embeds_tokens and parallel_state.get_tensor_and_context_parallel_rank() == 0:
            num_places = batch.tokens.numel() * parallel_state.get_context_parallel_world_size()
            self._tokens += (batch.num_row_tokens, batch.num_tokens, num_places)

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: list, reduced: Any) -> None:
        of_rows, computed, with_padding = self._tokens.tolist()
        tokens = {
            "data/token_efficiency": (computed, with_padding),
            "data/tokens_shared": (of_rows - computed, of_rows),
        }
        statistics = reduce_statistics(microbatch_outputs, names=self._names, of_rank=tokens)
        self._names = [name for name in statistics if name not in tokens]
        self._latest = means(statistics)
        self._tokens_of_rows = statistics["data/tokens_shared"][1].item()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        seconds = time.perf_counter() - self._step_started
        values = {**self._latest, "tokens_per_second": self._tokens_of_rows / seconds}
        of_nemo = trainer.callback_metrics
        values |= {name: float(of_nemo[name]) for name in ("grad_norm", "lr") if name in of_nemo}
        is_logged = trainer.global_step % self._log_every_n_steps == 0 or trainer.should_stop
        self._log(trainer, values, to_loggers=is_logged)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peaks: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(peaks, peak_memory())
        if trainer.is_global_zero:
            (self._folder / "memory.json").write_text(json.dumps({"peak_bytes_by_rank": peaks}))


def peak_memory() -> int:
    """This rank's peak memory so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Validation(pl.Callback):
    """Evaluates the policy on every validation prompt: before the first step, at intervals, and at the end.

    The means are reported as ``val/<metric>``.

    Args:
        data: the validation data.
        log: where the numbers go.
        intervals: optimizer steps between evaluations; where one of several ends, there is one.
        micro_batch_size: prompts.
    """

    def __init__(self, data: AlignmentData, log: StepLog, *, intervals: Collection[int], micro_batch_size: int) -> None:
        self._data = data
        self._log = log
        self._intervals = intervals
        self._micro_batch_size = micro_batch_size
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == trainer.max_steps or any(step % interval == 0 for interval in self._intervals):
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        chunks, micro_batches = model_chunks(trainer), self._data.micro_batches_of_rank(self._micro_batch_size)
        log_ratio = None
        if self._data.mismatched is not None:
            log_ratio = mean_log_ratio(
                chunks,
                micro_batches,
                make_micro_batch=self._data.mismatched.micro_batch,
                vocab_size=pl_module.vocab_size,
            )
        values = evaluate(
            chunks,
            micro_batches,
            make_micro_batch=self._data.micro_batch,
            objective=pl_module.objective,
            objective_config=pl_module.objective_config,
            vocab_size=pl_module.vocab_size,
            mismatched_log_ratio=log_ratio,
        )
        self._log(trainer, {f"val/{name}": value for name, value in values.items()})
