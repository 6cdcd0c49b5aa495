"""Data that a study makes before it trains: a directory filled by a function, or rows with rewards from scorers."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

from nemo_rao.errors import UserError
from nemo_rao.rows.reading import expand_paths
from nemo_rao.runtime.files import write_atomically
from nemo_rao.scoring.rule import find_function
from nemo_rao.scoring.run import Job
from nemo_rao.study.plan import PlannedData
from nemo_rao.study.policies import score_rows
from nemo_rao.study.study_file import Made

RECORD = "made.json"  # in a directory that a function has filled; absent while it is being filled


def check_data(data: PlannedData, *, ready: bool) -> None:
    """Checks what is known before anything that the data needs is there.

    Args:
        ready: whether all of it is there.

    Raises:
        UserError: names the key.
    """
    where, spec = f"data.{data.name}", data.spec
    if isinstance(spec, Made):
        try:
            function = find_function(spec.function)
        except UserError as error:
            raise UserError(f"{where}.function: {error}") from None
        try:
            inspect.signature(function).bind(data.path, **spec.arguments)
        except TypeError as error:
            raise UserError(f"{where}.arguments: {spec.function} does not take them ({error})") from None
        if data.path.exists() and not _record(data.path).is_file() and any(data.path.iterdir()):
            return  # interrupted: it is made anew
        if _record(data.path).is_file() and json.loads(_record(data.path).read_text()) != _made_from(spec):
            raise UserError(
                f"{where}: {data.path} was made with another function or other arguments; give another --out, or "
                "remove that directory"
            )
    elif ready:
        try:
            expand_paths(spec.input)
        except UserError as error:
            raise UserError(f"{where}.input: {error}") from None


def make_data(data: PlannedData) -> bool:
    """Makes the data; returns whether there was anything to do.

    Raises:
        UserError, RankFailure: it cannot be made.
    """
    spec = data.spec
    if isinstance(spec, Made):
        if _record(data.path).is_file():
            return False
        shutil.rmtree(data.path, ignore_errors=True)
        data.path.mkdir(parents=True)
        find_function(spec.function)(data.path, **spec.arguments)
        write_atomically(_record(data.path), json.dumps(_made_from(spec), indent=2) + "\n")
        return True
    if data.path.exists():
        return False
    score_rows(
        Job(
            spec.input,
            data.path,
            spec.scorer,
            weight=spec.weight,
            standardize=spec.standardize,
            shift=spec.shift,
            scale=spec.scale,
        )
    )
    return True


def _record(path: Path) -> Path:
    return path / RECORD


def _made_from(spec: Made) -> dict[str, object]:
    found: dict[str, object] = json.loads(json.dumps({"function": spec.function, "arguments": spec.arguments}))
    return found
