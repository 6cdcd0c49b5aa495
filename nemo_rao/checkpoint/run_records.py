"""Records that a run writes to its directory, for its next start and for readers.

recipe.yaml      every key
data.json        for each data set: number of prompts, fingerprints, what was dropped
run.json         versions of nemo-rao, engine, start, planned steps, and where it has finished
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
from nemo_rao.runtime.source_version import source_version

NOT_RECORDED = "a version without a record"  # that took part in a run

RECIPE, DATA, RUN, CHANGES = "recipe.yaml", "data.json", "run.json", "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """A key, or a data set, that differs from a run's record.

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
    """Read ``run.json``, see :func:`write_run`; empty if absent.

    Raises:
        UserError: the file is damaged.
    """
    return _read_json(folder / RUN)


def versions_of(folder: Path) -> list[str]:
    """Versions of nemo-rao that trained a run, in order; [] if it has no ``run.json``."""
    record = read_run(folder)
    return list(record.get("versions", [NOT_RECORDED])) if record else []


def write_run(
    folder: Path,
    *,
    start_from: Path | None,
    max_steps: int,
    finished_at: int | None = None,
    engine: str,
    continues: bool = False,
) -> None:
    """Write ``run.json``: versions that trained a run, its engine, start, number of steps, and whether it has finished.

    Args:
        start_from: checkpoint with the weights that the run started from; ``None``: random weights.
        max_steps: planned optimizer steps.
        finished_at: steps of a finished run; its last checkpoint is then recorded, too.
        engine: engine of the run.
        continues: the run goes on from what the present ``run.json`` records, whose versions are kept.

    Raises:
        UserError: the present ``run.json`` is damaged.
    """
    earlier = versions_of(folder) if continues else []
    record: dict[str, Any] = {
        "versions": list(dict.fromkeys([*earlier, source_version()])),
        "engine": engine,
        "start_from": None if start_from is None else str(start_from),
        "max_steps": max_steps,
    }
    if finished_at is not None:
        checkpoint = last_checkpoint(folder)
        record |= {"finished_at": finished_at, "checkpoint": None if checkpoint is None else checkpoint.name}
    write_atomically(folder / RUN, json.dumps(record, indent=2) + "\n")


def read_data_record(folder: Path) -> Mapping[str, Any]:
    """Read ``data.json``: number of prompts and fingerprints of each data set; empty if absent.

    Raises:
        UserError: the file is damaged.
    """
    return _read_json(folder / DATA)


def data_record(train: PreferenceData, validation: PreferenceData | None) -> dict[str, Any]:
    """Return the contents of ``data.json``: ``fingerprint`` covers the tokens, ``contents`` all that is trained on."""
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
        raise UserError(f"{path}: cannot be read ({error}). Restore it, or use another exp_manager.name.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object. Restore it, or use another exp_manager.name.")
    return found


def has_results(folder: Path) -> bool:
    """Whether there is something to resume: a checkpoint, or a finished run that keeps none."""
    return last_checkpoint(folder) is not None or ended_without_checkpoint(folder)


def ended_without_checkpoint(folder: Path) -> bool:
    record = read_run(folder)
    return "finished_at" in record and record["checkpoint"] is None


def record_changes(folder: Path, changes: list[Change], step: int) -> None:
    """Append a line to ``changes.jsonl``: the step from which the changes hold, when, and what changed."""
    if not changes:
        return
    line = {
        "step": step,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "changes": [{"key": change.key, "old": change.old, "new": change.new} for change in changes],
    }
    with (folder / CHANGES).open("a") as file:
        file.write(json.dumps(line) + "\n")
