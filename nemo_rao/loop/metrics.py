"""Metrics of a step, reduced over all ranks and reported under their step."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_rao.batch import MicroBatch
from nemo_rao.loop.session import METRICS, Hook, Session, log
from nemo_rao.loop.throughput import Throughput
from nemo_rao.mcore.loss import means, reduce_statistics
from nemo_rao.planning.compute import Work
from nemo_rao.runtime.metrics_file import truncate_metrics

_PAIRS = "pairs of queries and keys"  # reduced with the metrics, but not logged


class Metrics(Hook):
    """Reduces a step's statistics over the global batch and logs them, on every rank alike.

    In addition to the objective's metrics:

        seconds/update           from the first micro-batch to the end of the optimizer's step, of the policy only
        tokens_per_second        tokens of the batch's rows, prompt and response, in any layout, per second of that
                                 time; over all ranks
        data/token_efficiency    computed tokens divided by those with padding
        data/tokens_shared       fraction of the rows' tokens that was not computed because prompts were shared
        perf/mfu, perf/tflops_per_gpu    on GPUs, see :mod:`nemo_rao.loop.throughput`

    A resumed run first drops the lines of steps that it will repeat. At the end, rank 0 writes each rank's peak memory
    to ``memory.json``, in bytes: of the GPU, or of the process on a CPU, including memory shared with other ranks.

    Args:
        log_every_n_steps: steps between two entries of the loggers; ``metrics.jsonl`` has every step.
        throughput: throughput metrics of the run; ``None``: FLOP/s and MFU are not logged.
    """

    def __init__(self, *, log_every_n_steps: int, throughput: Throughput | None = None) -> None:
        self._log_every_n_steps = log_every_n_steps
        self._throughput = throughput
        self._step_started = 0.0
        self._counts = np.zeros(4)
        self._names: list[str] = []  # names of the objective's statistics, set at the first step

    def start(self, session: Session) -> None:
        if session.is_first_rank:
            truncate_metrics(session.folder / METRICS, session.step or -1)

    def before_step(self, session: Session) -> None:
        self._step_started = time.perf_counter()
        self._counts = np.zeros(4)
        session.loss.take_statistics()

    def micro_batch(self, session: Session, batch: MicroBatch, *, embeds_tokens: bool) -> None:
        # Counted once: by the chunk that embeds the tokens, on one of the ranks that hold them.
        if embeds_tokens and parallel_state.get_tensor_and_context_parallel_rank() == 0:
            num_positions = batch.tokens.numel() * parallel_state.get_context_parallel_world_size()
            self._counts += (batch.num_row_tokens, batch.num_tokens, num_positions, batch.num_attention_pairs)

    def after_step(self, session: Session) -> None:
        of_rows, computed, with_padding, pairs = self._counts.tolist()
        tokens = {
            "data/token_efficiency": (computed, with_padding),
            "data/tokens_shared": (of_rows - computed, of_rows),
        }
        counts = {**tokens, _PAIRS: (pairs, 0)}
        statistics = reduce_statistics(session.loss.take_statistics(), names=self._names, of_rank=counts)
        self._names = [name for name in statistics if name not in counts]
        values = means(statistics)
        summed = {name: statistics[name].tolist() for name in counts}  # synchronizes with the GPU
        seconds = time.perf_counter() - self._step_started
        values["seconds/update"] = seconds
        values["tokens_per_second"] = summed["data/tokens_shared"][1] / seconds
        if self._throughput is not None:
            work = Work(tokens=int(summed["data/token_efficiency"][0]), pairs=int(summed[_PAIRS][0]))
            values |= self._throughput.metrics(work, seconds)
        of_engine = session.reported()
        values |= {name: of_engine[name] for name in ("grad_norm", "lr") if name in of_engine}
        is_logged = session.step % self._log_every_n_steps == 0 or session.is_stopping
        log(session, values, to_loggers=is_logged)

    def end(self, session: Session) -> None:
        peaks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(peaks, peak_memory())
        if session.is_first_rank:
            (session.folder / "memory.json").write_text(json.dumps({"peak_bytes_by_rank": peaks}))


def peak_memory() -> int:
    """Return this rank's peak memory so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
