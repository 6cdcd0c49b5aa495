"""What a run records in its folder, for its next start and for whoever reads it.

recipe.yaml      every key
data.json        of each data set: number of prompts, fingerprints, what was dropped
run.json         engine, start, planned steps, and where it has ended
changes.jsonl    what changed from one start to the next, and from which step on
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically

RECIPE, DATA, RUN, CHANGES = "recipe.yaml", "data.json", "run.json", "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """A key, or a data set, that differs from what a run has recorded.

    Attributes:
        key: dotted, such as ``model.optim.lr``.
        old, new: the values.
        keeps_numbers: the run's numbers stay the same, to rounding.
        loads: the run's checkpoint can be loaded with it.
    """

    key: str
    old: Any
    new: Any
    keeps_numbers: bool
    loads: bool = True


def read_run(folder: Path) -> Mapping[str, Any]:
    """``run.json``, see :func:`write_run`; empty where absent.

    Raises:
        UserError: the file is damaged.
    """
    return _read_json(folder / RUN)


def write_run(
    folder: Path, *, start_from: Path | None, max_steps: int, finished_at: int | None = None, engine: str
) -> None:
    """Write ``run.json``: a run's engine, what it started from, how many steps it has, and whether it has ended.

    Args:
        start_from: checkpoint whose weights the run started with; ``None``: random ones.
        max_steps: planned optimizer steps.
        finished_at: steps of a run that has reached its end; its last checkpoint is then recorded, too.
        engine: that drives it.
    """
    record: dict[str, Any] = {
        "engine": engine,
        "start_from": None if start_from is None else str(start_from),
        "max_steps": max_steps,
    }
    if finished_at is not None:
        checkpoint = last_checkpoint(folder)
        record |= {"finished_at": finished_at, "checkpoint": None if checkpoint is None else checkpoint.name}
    write_atomically(folder / RUN, json.dumps(record, indent=2) + "\n")


def read_data_record(folder: Path) -> Mapping[str, Any]:
    """``data.json``: for each data set its number of prompts and its fingerprints; empty where absent.

    Raises:
        UserError: the file is damaged.
    """
    return _read_json(folder / DATA)


def data_record(train: PreferenceData, validation: PreferenceData | None) -> dict[str, Any]:
    """What ``data.json`` holds: ``fingerprint`` is of the tokens alone, ``contents`` of all that is trained on."""
    data_sets = {"training": train, "validation": validation}
    return {
        name: {
            "num_prompts": len(data),
            "fingerprint": data.fingerprint(),
            "contents": data.contents_fingerprint(),
            "report": str(data.report),
        }
        for name, data in data_sets.items()
        if data is not None
    }


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or give the run another name") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be an object of JSON; restore it, or give the run another name")
    return found


def has_results(folder: Path) -> bool:
    """Whether there is something to continue: a checkpoint, or the end of a run that was to keep none."""
    return last_checkpoint(folder) is not None or ended_without_checkpoint(folder)


def ended_without_checkpoint(folder: Path) -> bool:
    record = read_run(folder)
    return "finished_at" in record and record["checkpoint"] is None


def record_changes(folder: Path, changes: list[Change], step: int) -> None:
    """Appends a line to ``changes.jsonl``: the step from which the changes hold, when, and what changed."""
    if not changes:
        return
    line = {
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "changes": [{"key": change.key, "old": change.old, "new": change.new} for change in changes],
    }
    with (folder / CHANGES).open("a") as file:
        file.write(json.dumps(line) + "\n")
