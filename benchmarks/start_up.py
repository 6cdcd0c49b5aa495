"""Seconds from ``nemo-rao train`` to the end of its first step by part, without caches and with them.

    python -m benchmarks.start_up

Every run is a command in a new interpreter. ``first`` has an empty directory of runs; ``again`` is another run in the
same directory, from the same weights on the same data, which finds the reference pass done{and}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.inputs import ModelSizes, made_up_rows
from benchmarks.results import parser, summary, write_result
from nemo_rao.config.run_config import DataConfig
from nemo_rao.demo.tokenizer_training import train_tokenizer


def main() -> None:
    cached = any(field.name == "cache_dir" for field in dataclasses.fields(DataConfig))
    arguments_of = parser((__doc__ or "").replace("{and}", " and the data tokenized" if cached else ""), repeats=2)
    arguments_of.add_argument("--data", help="preference file; default: generated rows")
    arguments_of.add_argument("--prompts", type=int, default=200, help="number of generated prompts")
    arguments_of.add_argument("--responses", type=int, default=2, help="K")
    arguments = arguments_of.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "made_up.jsonl"
        rows = list(made_up_rows(arguments.prompts, arguments.responses, 0))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [answer["content"] for row in rows for answer in row["responses"]]
        train_tokenizer(texts, folder / "tokenizer", ModelSizes().vocab)
        for repeat in range(arguments.repeats):
            for which in runs:
                overrides = [
                    f"data.train_path={arguments.data or data}",
                    f"data.tokenizer={folder / 'tokenizer'}",
                    f"data.num_responses={arguments.responses}",
                    f"trainer.threads_per_rank={arguments.threads}",
                    "trainer.enable_progress_bar=false",
                    f"exp_manager.exp_dir={folder / str(repeat)}",
                    f"exp_manager.name={which}",
                ]
                runs[which].append(one_run(overrides, folder / "report.json", arguments.threads))
    figures = {
        which: {part: summary([one.get(part, 0.0) for one in of_which]) for part in of_which[0]}
        for which, of_which in runs.items()
    }
    print(f"{'seconds, fastest':<32} {'first':>8} {'again':>8}")
    for part in figures["first"]:
        print(f"{part:<32} {figures['first'][part]['min']:>8.2f} {figures['again'][part]['min']:>8.2f}")
    shown = {"data": Path(arguments.data).name if arguments.data else None}
    write_result("start_up", arguments, {"data_cache": cached, "runs": figures}, shown=shown)


def one_run(overrides: list[str], report: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.start_up_command", str(time.time()), str(report), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(report.read_text())


if __name__ == "__main__":
    main()
