"""Rows from files: JSON Lines (plain or .gz), Parquet, data sets of the `datasets` package.

What can be wrong with a file is found here and reported with the file and the line; what can be wrong with a record
is found in ``formats``.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.data.fields import RewardField
from nemo_rao.data.formats import recognise
from nemo_rao.errors import UserError

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
HUB = "hf:"
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_rows(
    paths: Paths,
    *,
    reward_field: RewardField = None,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
    on_bad: Callable[[UserError], None] | None = None,
) -> Iterator[Row]:
    """The rows of one or several sources, in order.

    Args:
        paths: a file, a glob, a folder written by ``Dataset.save_to_disk``, ``hf:NAME`` or ``hf:NAME:SPLIT``; or a
            list of these.
        reward_field: where the reward stands, if not where the format has it: a field of the response, or a path
            into it such as ``annotations.helpfulness.Rating``. It must then be there in every row. A list of these is
            an ensemble of reward models, whose mean is the reward.

    Raises:
        UserError: at once where a file is missing or ``reward_field`` names nothing; while reading, for whatever is
            wrong with a row.
    """
    names = [reward_field] if isinstance(reward_field, str) else reward_field
    if names is not None and not (names and all(names)):
        raise UserError(
            f"data.reward_field={reward_field!r} names no field; name one, or a list for an ensemble, or set it to null"
        )
    sources = expand_paths(paths)
    return (row for source in sources for row in _rows_of_source(source, reward_field, on_bad))


def expand_paths(paths: Paths) -> list[str]:
    """Globs resolved (in sorted order) and existence checked. ``hf:`` names are left as they are."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise UserError("no data files are given; name at least one")
    sources: list[str] = []
    for entry in [os.fspath(path) for path in given]:
        path = os.path.expanduser(entry)
        if entry.startswith(HUB) or os.path.exists(path):
            sources.append(entry if entry.startswith(HUB) else path)
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise UserError(f"{entry}: no file matches this pattern; check it, and the folder it starts from")
            sources.extend(matches)
        else:
            raise UserError(
                f"{entry}: no such file (looked from {os.getcwd()}); give a file, a pattern, "
                f"or {HUB}NAME for a data set of the `datasets` package"
            )
    return sources


def _rows_of_source(
    source: str, reward_field: RewardField, on_bad: Callable[[UserError], None] | None
) -> Iterator[Row]:
    """Rows of one source. Consecutive records of one response each and the same prompt become one row."""
    open_row: Row | None = None
    for place, record in read_records_of(source):
        try:
            known = recognise(record, place)
            row = known.convert(record, place, reward_field)  # type: ignore[arg-type]
        except UserError as complaint:
            if on_bad is None:
                raise
            on_bad(complaint)
            continue
        if open_row is not None:
            if known.one_response_a_record and open_row.prompt == row.prompt:
                open_row = dataclasses.replace(open_row, responses=open_row.responses + row.responses)
                continue
            yield open_row
            open_row = None
        if known.one_response_a_record:
            open_row = row
        else:
            yield row
    if open_row is not None:
        yield open_row


def read_records_of(source: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of one source, whatever its kind."""
    if source.startswith(HUB):
        return _numbered(source, _hub_dataset(source))
    if os.path.isdir(source):
        return _numbered(source, _saved_dataset(source))
    if source.endswith(JSON_LINES):
        return _json_lines(source)
    if source.endswith(PARQUET):
        return _numbered(source, _parquet(source))
    raise UserError(f"{source}: unknown kind of file; accepted are {', '.join(JSON_LINES + PARQUET)}")


def _numbered(source: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source} row {number}", record) for number, record in enumerate(records, start=1))


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Lines are numbered from 1, blank ones included though they are skipped."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                place = f"{path} line {number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{place}: not UTF-8 at byte {error.start} of the line; write the file anew as UTF-8"
                    ) from None
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{place}: invalid JSON ({error.msg} at column {error.colno}); write one JSON object per line"
                    ) from None
                except (ValueError, RecursionError) as error:  # integers of thousands of digits, endless nesting
                    raise UserError(f"{place}: JSON that cannot be read ({_one_line(error)}); drop the row") from None
                yield place, record
    except EOFError:
        raise UserError(f"{path}: truncated .gz file, it ends after line {number}; copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: damaged .gz file after line {number} ({_one_line(error)}); copy or download it again, "
            "or drop .gz from its name if it is not compressed"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_one_line(error)}); copy or download it again") from None


def _hub_dataset(source: str) -> Iterable[Any]:
    """``hf:NAME[:SPLIT]``, through the `datasets` cache; code that a data set brings along is never run."""
    import datasets

    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise UserError(f"{source}: no data set is named; write {HUB}NAME or {HUB}NAME:SPLIT")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # the package raises many kinds: network, access, unknown name, unknown split
        raise UserError(
            f"{source}: `datasets` cannot load it ({type(error).__name__}: {_one_line(error)}); check the name and the "
            "split, or download it and give its files"
        ) from None
    return _only_split(loaded, source, f"{HUB}{name}:")


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of the `datasets` package wrote the folder."""
    return any(Path(folder, name).exists() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(folder: str) -> Iterable[Any]:
    if not is_saved_dataset(folder):
        raise UserError(
            f"{folder}: a folder that `save_to_disk` of the `datasets` package did not write; "
            f"give its files, for instance {os.path.join(folder, '*.jsonl')}"
        )
    import datasets

    try:
        loaded = datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(f"{folder}: `datasets` cannot load it ({type(error).__name__}: {_one_line(error)})") from None
    return _only_split(loaded, folder, folder.rstrip("/") + "/")


def _only_split(loaded: Any, source: str, prefix: str) -> Iterable[Any]:
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) > 1:
        raise UserError(f"{source}: has several splits; give one of {', '.join(prefix + split for split in loaded)}")
    return next(iter(loaded.values()))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
