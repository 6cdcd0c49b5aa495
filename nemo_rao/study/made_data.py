"""Data that a study makes before it trains: a directory filled by a function, or rows with rewards from scorers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from nemo_rao.errors import UserError, errors_at
from nemo_rao.rows.reading import expand_paths
from nemo_rao.runtime.files import write_atomically
from nemo_rao.scoring.rule import find_function
from nemo_rao.scoring.run import Job
from nemo_rao.study.planned import PlannedData
from nemo_rao.study.policies import score_rows
from nemo_rao.study.schema import Made, Scored

RECORD = "made.json"


def check_data(data: PlannedData, *, ready: bool) -> None:
    """Checks what is known before anything that the data needs is there.

    Args:
        ready: whether all of it is there.

    Raises:
        UserError: names the key.
    """
    where, spec = f"files.{data.name}", data.spec
    if isinstance(spec, Made):
        with errors_at(f"{where}.function"):
            function = find_function(spec.function)
        try:
            inspect.signature(function).bind(data.path, **spec.arguments)
        except TypeError as error:
            raise UserError(f"{where}.arguments: {spec.function} does not take them ({error})") from None
    elif ready:
        with errors_at(f"{where}.input"):
            expand_paths(spec.input)
    record = _record(data)
    if record.is_file() and json.loads(record.read_text()) != _made_from(spec):
        raise UserError(
            f"{where}: {data.path} was made from other keys; give another --out, or remove it and {record.name}"
        )


def make_data(data: PlannedData) -> bool:
    """Makes the data; returns whether there was anything to do.

    Raises:
        UserError, RankFailure: it cannot be made.
    """
    spec, record = data.spec, _record(data)
    if record.is_file() and data.path.exists():
        return False
    if isinstance(spec, Made):
        shutil.rmtree(data.path, ignore_errors=True)  # what an interruption has left
        data.path.mkdir(parents=True)
        function: Callable[..., object] = find_function(spec.function)
        function(data.path, **spec.arguments)
    elif not data.path.exists():
        names = ("weight", "standardize", "shift", "scale")
        score_rows(Job(spec.input, data.path, spec.scorer, **{name: vars(spec)[name] for name in names}))
    write_atomically(record, json.dumps(_made_from(spec), indent=2) + "\n")
    return True


def _record(data: PlannedData) -> Path:
    """What the data was made from; absent while it is being made."""
    is_directory = isinstance(data.spec, Made)
    return data.path / RECORD if is_directory else data.path.with_name(f"{data.path.name}.{RECORD}")


def _made_from(spec: Made | Scored) -> dict[str, object]:
    found: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(spec)))
    return found
