"""Scaling of an RAO step with K, T, micro-batches and ranks, and the pipeline bubble.

    python -m benchmarks.scaling

All rows of a run have equal length, so nothing is padded. Each table changes one parameter of the base configuration:

    K     responses of a prompt
    T     tokens of a row, prompt and response
    m     micro-batches of the same global batch
    ranks tensor- and pipeline-parallel ranks, all with one thread, against one rank with one

Runs of a table take turns (:mod:`benchmarks.sessions`). Memory is the maximum over ranks. On one machine's CPU, ranks
share cores and memory bandwidth: the benchmark shows the cost of parallelism, but not its gain on separate devices.

The pipeline bubble is measured from the stages' busy times, not from the length of the run: Megatron's timers around
the forward and backward of each micro-batch give a stage's busy time; for the rest of the schedule it waits. With p
equal stages and m micro-batches, 1F1B waits (p - 1) / (m + p - 1) of the time. A vocabulary of 320 tokens keeps the
output layer from making the last stage the longest. As stages are still not exactly equal, the same schedule is also
simulated with each stage's measured times (``of these stages``); the remaining difference is communication.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import ModelSizes, train_on_made_up_text, write_uniform_rows
from benchmarks.results import parser, summary, write_result
from benchmarks.sessions import Session, Turn, in_turn, prepare_server
from benchmarks.training import ENDLESS, run_ours

SIZES = ModelSizes()
SMALL_VOCABULARY = 320
BATCH, BASE = 8, {"K": 2, "T": 256, "m": 2, "tp": 1, "pp": 1}
TABLES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "K": [{"K": number} for number in (1, 2, 4, 8)],
    "T": [{"T": number} for number in (128, 256, 512, 1024)],
    "m": [{"m": number} for number in (1, 2, 4, 8)],
    "ranks": [{"m": 8, "tp": tp, "pp": pp} for tp, pp in ((1, 1), (2, 1), (1, 2))],
    "bubble": [{"m": number, "pp": 2} for number in (1, 2, 4, 8)],
}


def main() -> None:
    arguments_of = parser(__doc__, repeats=3)
    arguments_of.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = arguments_of.parse_args()
    prepare_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_on_made_up_text(folder / "tokenizer", SIZES.vocab)
        train_on_made_up_text(folder / "small_tokenizer", SMALL_VOCABULARY)
        tables = {table: measure(table, folder, arguments) for table in arguments.tables}
    write_result("scaling", arguments, {"base": {**BASE, "prompts": BATCH}, "tables": tables})


def measure(table: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a table, which are also printed."""
    settings = [{**BASE, **changed} for changed in TABLES[table]]
    threads = 1 if table in ("ranks", "bubble") else arguments.threads
    tokenizer = folder / ("small_tokenizer" if table == "bubble" else "tokenizer")
    sessions = {str(number): start(one, threads, folder, tokenizer) for number, one in enumerate(settings)}
    rounds = in_turn(sessions, repeats=arguments.repeats)
    rows = [row_of(one, rounds[str(number)]) for number, one in enumerate(settings)]
    keys = ["K", "T", "m", "tp", "pp"]
    print(f"\n{table}\n" + " ".join(f"{key:>5}" for key in keys), f"{'seconds':>8} {'x first':>8} {'MiB':>6}", end=" ")
    print("idle, formula, of these stages" if table == "bubble" else "")
    for row in rows:
        print(" ".join(f"{row[key]:>5}" for key in keys), f"{row['seconds']['min']:>8.2f}", end=" ")
        row["time_over_first"] = row["seconds"]["min"] / rows[0]["seconds"]["min"]
        print(f"{row['time_over_first']:>8.2f} {row['peak_bytes'] / 2**20:>6.0f}", end=" ")
        if table == "bubble":
            idle = row["idle"]
            print(f"{idle['measured']['median']:.3f}, {idle['formula']:.3f}, {idle['of_these_stages']:.3f}", end="")
        print(flush=True)
    return rows


def start(one: Mapping[str, int], threads: int, folder: Path, tokenizer: Path) -> Session:
    data = folder / f"{tokenizer.name}-{one['K']}-{one['T']}.jsonl"
    if not data.exists():
        sizes = {"num_prompts": BATCH, "num_responses": one["K"], "length": one["T"]}
        write_uniform_rows(data, tokenizer, **sizes)
    overrides = [
        *ENDLESS,
        f"data.train_path={data}",
        f"data.tokenizer={tokenizer}",
        *SIZES.overrides,
        "model.seq_length=2048",
        f"model.global_batch_size={BATCH}",
        f"model.micro_batch_size={BATCH // one['m']}",
        f"model.tensor_model_parallel_size={one['tp']}",
        f"model.pipeline_model_parallel_size={one['pp']}",
        f"trainer.devices={one['tp'] * one['pp']}",
        f"trainer.threads_per_rank={threads}",
        f"exp_manager.exp_dir={folder / 'runs'}",
        f"exp_manager.name=run-{time.monotonic_ns()}",
    ]
    return Session(run_ours, ("gpt_rao", overrides, None, (stage_times,)), steps=1, forked=True)


def row_of(one: Mapping[str, int], rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # Figures of a step are gathered at its end, so those of the last round are also complete.
    steps = [of_round["notes"]["ranks"] for of_round in rounds]
    row: dict[str, Any] = {
        **one,
        "seconds": summary([of_round["seconds"] for of_round in rounds]),
        "peak_bytes": max(rank["peak_bytes"] for rank in steps[-1]),
    }
    if one["pp"] > 1:
        row["idle"] = {
            "measured": summary([idle(ranks) for ranks in steps]),
            "formula": (one["pp"] - 1) / (one["m"] + one["pp"] - 1),
            "of_these_stages": statistics.median(idle_of_1f1b(ranks, one["m"]) for ranks in steps),
        }
    return row


# ----------------------------------------------------------------------------------------------- bubble


def idle(ranks: Sequence[Mapping[str, float]]) -> float:
    """The fraction of the schedule in which a stage computes nothing, over all stages."""
    length = max(rank["forward-backward"] for rank in ranks)
    return 1 - statistics.fmean(rank["forward-compute"] + rank["backward-compute"] for rank in ranks) / length


def idle_of_1f1b(ranks: Sequence[Mapping[str, float]], m: int) -> float:
    """The same for a pipeline without communication, whose stages take the measured times for each micro-batch."""
    p = len(ranks)
    cost = [{"F": rank["forward-compute"] / m, "B": rank["backward-compute"] / m} for rank in ranks]
    ends: dict[tuple[str, int, int], float] = {}  # (direction, stage, micro-batch)
    orders = [order_of_1f1b(stage, p, m) for stage in range(p)]
    free = [0.0] * p
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                direction, batch = order[0]
                neighbour = stage - 1 if direction == "F" else stage + 1
                needed = (direction, neighbour, batch)
                if 0 <= neighbour < p and needed not in ends:
                    break
                begin = max(free[stage], ends.get(needed, 0.0))
                free[stage] = ends[direction, stage, batch] = begin + cost[stage][direction]
                order.pop(0)
    busy = [m * (one["F"] + one["B"]) for one in cost]
    return 1 - statistics.fmean(busy) / max(free)


def order_of_1f1b(stage: int, p: int, m: int) -> list[tuple[str, int]]:
    """The order of a stage's work: some forwards, then alternating forwards and backwards, then the rest."""
    ahead = min(p - stage - 1, m)
    order = [("F", batch) for batch in range(ahead)]
    for batch in range(m - ahead):
        order += [("F", ahead + batch), ("B", batch)]
    return order + [("B", batch) for batch in range(m - ahead, m)]


class StageTimers:
    """``config.timers`` for Megatron's schedules: seconds by name since :meth:`clear`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._watches: dict[str, Stopwatch] = {}

    def __call__(self, name: str, log_level: int | None = None) -> Stopwatch:
        return self._watches.setdefault(name, Stopwatch(self.seconds, name))

    def clear(self) -> None:
        self.seconds.clear()


class Stopwatch:
    """Adds the time from :meth:`start` to :meth:`stop` to the timers' seconds; Megatron's own adds a barrier."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name, self._started = seconds, name, 0.0

    def start(self, barrier: bool = False) -> None:
        self._started = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._started


def stage_times(turn: Turn) -> Any:
    """A callback that records each step's busy times and peak memory of every rank as ``ranks``."""
    import torch
    from megatron.core.utils import get_model_config

    from nemo_rao.loop.session import Hook

    timers = StageTimers()

    class StageTimes(Hook):
        def start(self, session: Any) -> None:
            for chunk in session.chunks:
                get_model_config(chunk).timers = timers

        def before_step(self, session: Any) -> None:
            timers.clear()

        def after_step(self, session: Any) -> None:
            ranks: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(ranks, {**timers.seconds, "peak_bytes": turn.peak_bytes()})
            turn.notes["ranks"] = ranks

    return StageTimes()


if __name__ == "__main__":
    main()
