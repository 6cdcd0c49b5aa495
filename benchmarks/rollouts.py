"""Time of an online step by phase, and scaling of the rollout with K, length and ranks.

    python -m benchmarks.rollouts

RLOO on a Llama with random weights, so that few responses end before the limit. Each table changes one parameter of the
base configuration:

    K     responses of a prompt
    N     tokens of a response
    ranks tensor- and pipeline-parallel ranks, all with one thread, against one rank with one

Runs of a table take turns (:mod:`benchmarks.sessions`). Phases are those that a run logs as ``seconds/<phase>``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import ModelSizes, train_on_made_up_text, write_uniform_rows
from benchmarks.results import parser, summary, write_result
from benchmarks.sessions import Session, in_child, in_turn, prepare_server
from benchmarks.training import ENDLESS, run_ours
from nemo_rao.runtime.metrics_file import read_metrics

SIZES = ModelSizes()
BATCH, PROMPT, BASE = 8, 64, {"K": 4, "N": 64, "tp": 1, "pp": 1}
TABLES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "K": [{"K": number} for number in (2, 4, 8, 16)],
    "N": [{"N": number} for number in (32, 64, 128, 256)],
    "ranks": [{"tp": tp, "pp": pp} for tp, pp in ((1, 1), (2, 1), (1, 2))],
}
PHASES = ("rollout", "reward", "reference", "update")


def main() -> None:
    arguments_of = parser(__doc__, repeats=3)
    arguments_of.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = arguments_of.parse_args()
    prepare_server()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_on_made_up_text(folder / "tokenizer", SIZES.vocab)
        write_uniform_rows(
            folder / "data.jsonl", folder / "tokenizer", num_prompts=BATCH, num_responses=1, length=PROMPT
        )
        in_child(make_start, common(folder), folder)
        tables = {table: measure(table, folder, arguments) for table in arguments.tables}
    write_result("rollouts", arguments, {"base": {**BASE, "prompts": BATCH}, "tables": tables})


def common(folder: Path) -> list[str]:
    return [
        f"data.train_path={folder / 'data.jsonl'}",
        f"data.tokenizer={folder / 'tokenizer'}",
        *SIZES.overrides,
        "model.seq_length=2048",
        f"model.global_batch_size={BATCH}",
        f"model.micro_batch_size={BATCH}",
        f"exp_manager.exp_dir={folder / 'runs'}",
    ]


def make_start(overrides: Sequence[str], folder: Path) -> None:
    """Weights for the start of all runs and for the reference, from a step without effect."""
    from nemo_rao.config.compose import compose
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.train import train

    quick = ("trainer.max_epochs=null", "trainer.max_steps=1", "trainer.enable_progress_bar=false")
    config = compose(
        "gpt_sft",
        [*overrides, *quick, "model.optim.lr=1e-12", "exp_manager.name=start", "exp_manager.draw_curves=false"],
    )
    check_run(config)
    train(config)


def length_of(prompt: str, response: str) -> float:
    """A rule that takes no time."""
    return len(response) / 1000


def measure(table: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a table, which are also printed."""
    settings = {f"{table}-{number}": {**BASE, **changed} for number, changed in enumerate(TABLES[table])}
    threads = 1 if table == "ranks" else arguments.threads
    sessions = {name: start(name, one, threads, folder) for name, one in settings.items()}
    rounds = in_turn(sessions, repeats=arguments.repeats)
    rows = [row_of(one, rounds[name], folder / "runs" / name) for name, one in settings.items()]
    print(f"\n{table}\n" + " ".join(f"{key:>5}" for key in BASE), " ".join(f"{name:>10}" for name in PHASES), "tokens")
    for row in rows:
        of_phases = " ".join(f"{row['seconds'][phase]['min']:>10.3f}" for phase in PHASES)
        print(" ".join(f"{row[key]:>5}" for key in BASE), of_phases, f"{row['length']:.1f}", flush=True)
    return rows


def start(name: str, one: Mapping[str, int], threads: int, folder: Path) -> Session:
    overrides = [
        *ENDLESS,
        *common(folder),
        f"model.restore_from_path={folder / 'runs' / 'start'}",
        f"model.tensor_model_parallel_size={one['tp']}",
        f"model.pipeline_model_parallel_size={one['pp']}",
        f"trainer.devices={one['tp'] * one['pp']}",
        f"trainer.threads_per_rank={threads}",
        f"online.num_generations={one['K']}",
        f"online.max_new_tokens={one['N']}",
        f"online.rows_at_once={BATCH * one['K']}",
        f"online.reward=[rule:benchmarks.rollouts:{length_of.__name__}]",
        f"exp_manager.name={name}",
    ]
    return Session(run_ours, ("gpt_rloo", overrides, None, ()), steps=1, forked=True)


def row_of(one: Mapping[str, int], rounds: Sequence[Mapping[str, Any]], run: Path) -> dict[str, Any]:
    """A row of the table. Each round is a step of the run; the last ones are measured."""
    steps: dict[float, dict[str, float]] = {}
    for record in read_metrics(run / "metrics.jsonl"):
        steps.setdefault(record["step"], {}).update(record)
    counted = [steps[number] for number in sorted(steps)][-len(rounds) :]
    seconds = {name: [step[f"seconds/{name}"] for step in counted] for name in PHASES}
    for of_round, *parts in zip(rounds, *seconds.values(), strict=True):
        assert sum(parts) <= of_round["seconds"], "phases are parts of the step"
    return {
        **one,
        "seconds": {name: summary(values) for name, values in seconds.items()}
        | {"step": summary([of_round["seconds"] for of_round in rounds])},
        "length": sum(step["rollout/length"] for step in counted) / len(counted),
        "peak_bytes": max(of_round["peak_bytes"] for of_round in rounds),
    }


if __name__ == "__main__":
    main()
