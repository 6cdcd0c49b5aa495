"""``nemo-rao train --multirun``: run a grid of recipes one after the other, and print a table of the results.

    overrides with several values, search=dpo -> compose_grid -> plan: a name for each run -> check
        -> run_sweep (several_runs.train_runs) -> one row per run -> table, .sweep.jsonl

The runs share ``exp_manager.exp_dir`` and so the cache of reference log-probabilities: those that start from the same
weights on the same data share one reference pass. :mod:`nemo_rao.training.several_runs` starts and continues the runs,
also under SLURM and torchrun. Not supported: concurrent runs, several values for what all runs share
(:data:`ONE_FOR_ALL`), Hydra's other sweepers, and NeMo-Run, whose experiments start one task per run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.config.checks import check_keys_are_read
from nemo_rao.config.compose import compose_grid
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.training.several_runs import (
    PlannedRun,
    check_runs,
    last_values,
    print_table,
    train_runs,
    write_results,
)

# Keys with one value for the whole sweep: output paths, and what the process that starts the runs has set up.
ONE_FOR_ALL = ("exp_manager.exp_dir", "exp_manager.name", "trainer.accelerator")
# Metrics in the table, if logged; the .sweep.jsonl has all of them.
SHOWN = ("val/loss", "loss", "rewards/margins", "rewards/accuracies", "rao/target_error")
MAX_NAME = 120  # characters of a run's name after the sweep's; checkpoints and logs add to the path


@dataclass(frozen=True)
class SweepRun(PlannedRun):
    """One run of a sweep.

    Attributes:
        overrides: what it sets differently from the others, ``key=value`` each; together its label.
    """

    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid.

    Attributes:
        name: ``exp_manager.name`` as given; prefix of the runs' names.
        runs: the runs, in the order in which they are trained.
    """

    name: str
    runs: tuple[SweepRun, ...]


def plan(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Sweep:
    """Compose and name all runs. Reads recipes only, no data.

    Args:
        config_name, overrides, config_dir: see :func:`nemo_rao.config.compose.compose_grid`.

    Raises:
        UserError: a run is invalid (its overrides are quoted), a key cannot be swept over, or two runs get one name.
    """
    grid = compose_grid(config_name, overrides, config_dir)
    sweep_name = grid[0][1].exp_manager.name
    runs: list[SweepRun] = []
    seen: dict[str, tuple[str, ...]] = {}
    for own, config in grid:
        _check_swept_keys(own, config)
        name = "-".join([sweep_name, *filter(None, [_name_of(own)])])
        for identity in (name, repr(config)):
            if (earlier := seen.setdefault(identity, own)) is not own:
                raise UserError(
                    f"{' '.join(own)}: gives the same run or run name, {name}, as {' '.join(earlier)}. Give each value "
                    "once, and texts that differ in more than punctuation."
                )
        config.exp_manager.name = name
        runs.append(SweepRun(name, " ".join(own), config, own))
    return Sweep(sweep_name, tuple(runs))


def check(sweep: Sweep) -> None:
    """See :func:`nemo_rao.training.several_runs.check_runs`."""
    check_runs(sweep.runs)


def run_sweep(sweep: Sweep) -> int:
    """Train the runs of a checked sweep and print the table.

    Returns:
        the exit code: 0, or 1 if a run failed.

    Raises:
        UserError: the data or a checkpoint does not fit; the first such run stops the sweep.
        RankFailure: under SLURM or torchrun, a run failed.
    """
    rows = []
    for run, state in zip(sweep.runs, train_runs(sweep.runs), strict=True):
        rows.append(_row(run, state))
        write_results(results_file(sweep), "".join(json.dumps(row) + "\n" for row in rows))
    _print(sweep, rows)
    return 1 if any(row["state"] == "failed" for row in rows) else 0


# ------------------------------------------------------------------------------------------------------------ names


def _check_swept_keys(own: Sequence[str], config: RunConfig) -> None:
    """Refuse keys that all runs share, and keys that a run's objective does not read: its runs would be identical."""
    for text in own:
        if (key := text.partition("=")[0]) in ONE_FOR_ALL:
            raise UserError(f"{text}: {key} must be the same for all runs of a sweep. Give one value.")
    check_keys_are_read(own, config)


def _name_of(own: Sequence[str]) -> str:
    """Return a directory name such as ``beta=0.05-lr=1e-07``; a long one ends in a digest of the whole."""
    keys = [text.partition("=")[0] for text in own]
    values = [re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text.partition("=")[2]).strip("_") for text in own]
    name = "-".join(f"{label}={value}" for label, value in zip(_labels(keys), values, strict=True))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _labels(keys: Sequence[str]) -> list[str]:
    """Return the last part of each key, or the whole key if last parts are equal."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


# ---------------------------------------------------------------------------------------------------------- results


def _row(run: SweepRun, state: str) -> dict[str, Any]:
    """Return the outcome of a run: name, overrides, state, and the last value of each logged metric."""
    overrides = {key: _read(value) for key, _, value in (text.partition("=") for text in run.overrides)}
    return {"name": run.name, "overrides": overrides, "state": state, **last_values(run.config)}


def _read(value: str) -> Any:
    """Parse a number; return anything else unchanged."""
    try:
        return float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        return value


def results_file(sweep: Sweep) -> Path:
    """Path of ``<exp_dir>/<sweep's name>.sweep.jsonl``, which has one line per run."""
    return run_dir(sweep.runs[0].config).with_name(f"{sweep.name}.sweep.jsonl")


def _print(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from nemo_rao.runtime.console import say

    keys = list(rows[0]["overrides"])
    shown = [name for name in SHOWN if any(name in row for row in rows)]
    table = Table(title=f"{sweep.name}, {len(rows)} runs", title_justify="left")
    for label in _labels(keys) or ["run"]:
        table.add_column(label)
    for label in ("step", *shown):
        table.add_column(label, justify="right")
    table.add_column("")
    for row in rows:
        own = [f"{value:g}" if isinstance(value, float) else str(value) for value in row["overrides"].values()]
        numbers = [f"{row[name]:.4g}" if name in row else "" for name in ("step", *shown)]
        table.add_row(*(own or [row["name"]]), *numbers, row["state"])
    print_table(table)
    say(f"also written to, with all metrics: {results_file(sweep)}")
