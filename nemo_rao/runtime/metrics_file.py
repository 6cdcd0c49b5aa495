"""``metrics.jsonl``: one line of JSON per step and per validation, written immediately by rank 0.

Each line has ``step``, the optimizer steps done; a training line has ``loss`` and the objective's metrics,
``grad_norm``, ``lr`` and ``tokens_per_second``, on GPUs also ``perf/mfu`` and ``perf/tflops_per_gpu``; a validation
line has the objective's metrics as ``val/<name>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nemo_rao.runtime.files import read_json_lines, write_atomically


def append_metrics(path: Path, record: Mapping[str, float]) -> None:
    """Append one line in a single write."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines, without a truncated last one."""
    return read_json_lines(path)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drop what was logged after ``last_step``: those steps will be repeated."""
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_atomically(path, (json.dumps(record) + "\n" for record in kept))
