"""``nemo-rao train --multirun``: the runs of a grid, one after the other, and a table of how each ended.

    overrides with several values, search=dpo -> compose_grid -> plan: a name for each run -> check
        -> run_sweep (several_runs.train_runs) -> a row a run -> table, .sweep.jsonl

The runs share ``exp_manager.exp_dir`` and so the cache of reference log-probabilities: those that start from the same
weights on the same data share one reference pass. How runs are started and continued, also under SLURM and torchrun:
:mod:`nemo_rao.training.several_runs`. Not supported: runs side by side, several values for what all runs share
(:data:`ONE_FOR_ALL`), Hydra's other sweepers, and NeMo-Run, whose own experiments start one task a run.
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

# Keys with one value for the whole sweep: where results go, and what the process that starts the runs has set up.
ONE_FOR_ALL = ("exp_manager.exp_dir", "exp_manager.name", "trainer.accelerator")
# Metrics in the table, of those that a run has logged; the .sweep.jsonl has all.
SHOWN = ("val/loss", "loss", "rewards/margins", "rewards/accuracies", "rao/target_error")
MAX_NAME = 120  # characters of a run's name after the sweep's own; folders of checkpoints and logs lie below it


@dataclass(frozen=True)
class SweepRun(PlannedRun):
    """One run of a sweep.

    Attributes:
        overrides: what it sets differently from the others, ``key=value`` each; together they are its label.
    """

    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid.

    Attributes:
        name: ``exp_manager.name`` as it was given; those of the runs begin with it.
        runs: in the order in which they are trained.
    """

    name: str
    runs: tuple[SweepRun, ...]


def plan(config_name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Sweep:
    """Composes and names all runs; reads recipes alone, no data.

    Args:
        config_name, overrides, config_dir: see :func:`nemo_rao.config.compose.compose_grid`.

    Raises:
        UserError: what is wrong in a run, with its overrides; a key that cannot be swept over; two runs of one name.
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
                    f"{' '.join(own)}: the run of {' '.join(earlier)} again, or another one of its name, {name}; give "
                    "each value once, and texts that differ in more than punctuation"
                )
        config.exp_manager.name = name
        runs.append(SweepRun(name, " ".join(own), config, own))
    return Sweep(sweep_name, tuple(runs))


def check(sweep: Sweep) -> None:
    """See :func:`nemo_rao.training.several_runs.check_runs`."""
    check_runs(sweep.runs)


def run_sweep(sweep: Sweep) -> int:
    """Trains the runs of a checked sweep and prints the table.

    Returns:
        the exit code: 0, or 1 where a run failed.

    Raises:
        UserError: the data or a checkpoint does not fit: the first such run stops the sweep.
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
    """Refuses keys that all runs share, and those that a run's objective does not read: equal runs would be trained."""
    for text in own:
        if (key := text.partition("=")[0]) in ONE_FOR_ALL:
            raise UserError(f"{text}: {key} is one for all runs of a sweep; give one value")
    check_keys_are_read(own, config)


def _name_of(own: Sequence[str]) -> str:
    """``beta=0.05-lr=1e-07``, fit for a folder; a long text ends in a digest of the whole."""
    keys = [text.partition("=")[0] for text in own]
    values = [re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text.partition("=")[2]).strip("_") for text in own]
    name = "-".join(f"{label}={value}" for label, value in zip(_labels(keys), values, strict=True))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _labels(keys: Sequence[str]) -> list[str]:
    """The keys' last parts; of keys that end alike, the whole."""
    last = [key.rpartition(".")[2] for key in keys]
    return [short if last.count(short) == 1 else key for short, key in zip(last, keys, strict=True)]


# ---------------------------------------------------------------------------------------------------------- results


def _row(run: SweepRun, state: str) -> dict[str, Any]:
    """How a run ended: name, overrides, state, and the last value of all that it has logged."""
    overrides = {key: _read(value) for key, _, value in (text.partition("=") for text in run.overrides)}
    return {"name": run.name, "overrides": overrides, "state": state, **last_values(run.config)}


def _read(value: str) -> Any:
    """A number as a number, anything else as it is written."""
    try:
        return float(value) if "." in value or "e" in value else int(value)
    except ValueError:
        return value


def results_file(sweep: Sweep) -> Path:
    """``<exp_dir>/<sweep's name>.sweep.jsonl``: a line a run."""
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
    say(f"the same, with all metrics: {results_file(sweep)}")
