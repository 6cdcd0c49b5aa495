"""Records from files: JSON Lines (plain or .gz), Parquet, data sets of the `datasets` package.

Errors in a file are reported with file and line.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError

JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PARQUET = (".parquet",)
HUB = "hf:"
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_OF_MANY_SHAPES = ("tools", "tool_calls", "function_call", "documents")
OnBad = Callable[[UserError], None]


def expand_paths(paths: Paths) -> list[str]:
    """Expand globs (in sorted order) and check existence. ``hf:`` names are returned unchanged."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise UserError("no data files given. Name at least one.")
    sources: list[str] = []
    for entry in [os.fspath(path) for path in given]:
        path = os.path.expanduser(entry)
        if entry.startswith(HUB) or os.path.exists(path):
            sources.append(entry if entry.startswith(HUB) else path)
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise UserError(
                    f"{entry}: no file matches this pattern. Check it, and the directory that it is relative to."
                )
            sources.extend(matches)
        else:
            raise UserError(
                f"{entry}: no such file (current directory: {os.getcwd()}). Pass a file, a pattern, "
                f"or {HUB}NAME for a data set of the `datasets` package."
            )
    return sources


def read_records_of(source: str, on_bad: OnBad | None = None) -> Iterator[tuple[str, Any]]:
    """Iterate over the (location, record) pairs of one source of any kind.

    Args:
        source: as returned by :func:`expand_paths`.
        on_bad: called with the error of a line that is not JSON, which is then skipped; ``None``: it is raised.
    """
    for location, record in _records(source):
        if not isinstance(record, UserError):
            yield location, record
        elif on_bad is None:
            raise record
        else:
            on_bad(record)


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """(location, record or its error) pairs."""
    if source.startswith(HUB):
        return _numbered(source, _hub_dataset(source))
    if os.path.isdir(source):
        return _numbered(source, _saved_dataset(source))
    if source.endswith(JSON_LINES):
        return _json_lines(source)
    if source.endswith(PARQUET):
        return _numbered(source, _parquet(source))
    raise UserError(f"{source}: unknown file type. Use one of {', '.join(JSON_LINES + PARQUET)}.")


def _numbered(source: str, records: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{source} row {number}", _without_fill(record)) for number, record in enumerate(records, start=1))


def _without_fill(value: Any, inside: bool = False) -> Any:
    """Remove the nulls with which column stores pad tools and calls, whose objects have different fields."""
    if isinstance(value, dict):
        return {
            name: _without_fill(entry, inside or name in _OF_MANY_SHAPES)
            for name, entry in value.items()
            if not (inside and entry is None)
        }
    return [_without_fill(entry, inside) for entry in value] if isinstance(value, list) else value


def _json_lines(path: str) -> Iterator[tuple[str, Any]]:
    """(location, record) pairs. Lines are numbered from 1; blank lines count but are skipped."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                location = f"{path} line {number}"
                if not line.strip():
                    continue
                yield location, _json_object(line, "utf-8-sig" if number == 1 else "utf-8", location)
    except EOFError:
        raise UserError(f"{path}: truncated .gz file (ends after line {number}). Copy or download it again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: damaged .gz file after line {number} ({_one_line(error)}). Copy or download it again, "
            "or drop .gz from its name if it is not compressed."
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json_object(line: bytes, encoding: str, location: str) -> Any:
    """The decoded line, or the error."""
    try:
        return json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        return UserError(f"{location}: not UTF-8 at byte {error.start} of the line. Rewrite the file as UTF-8.")
    except json.JSONDecodeError as error:
        return UserError(
            f"{location}: invalid JSON ({error.msg} at column {error.colno}). Write one JSON object per line."
        )
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, endless nesting
        return UserError(f"{location}: JSON that cannot be read ({_one_line(error)}). Drop the row.")


def _parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({_one_line(error)}). Copy or download it again.") from None


def _hub_dataset(source: str) -> Iterable[Any]:
    """Load ``hf:NAME[:SPLIT]`` through the `datasets` cache. Remote code is never run."""
    import datasets

    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise UserError(f"{source}: no data set is named. Write {HUB}NAME or {HUB}NAME:SPLIT.")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # the package raises many kinds: network, access, unknown name, unknown split
        raise UserError(
            f"{source}: `datasets` cannot load it ({type(error).__name__}: {_one_line(error)}). Check the name and the "
            "split, or download it and pass its files."
        ) from None
    return _only_split(loaded, source, f"{HUB}{name}:")


def is_saved_dataset(folder: str) -> bool:
    """Whether ``save_to_disk`` of the `datasets` package wrote the directory."""
    return any(Path(folder, name).exists() for name in ("state.json", "dataset_dict.json"))


def _saved_dataset(folder: str) -> Iterable[Any]:
    if not is_saved_dataset(folder):
        raise UserError(
            f"{folder}: not a directory written by `save_to_disk` of the `datasets` package. "
            f"Pass its files, for instance {os.path.join(folder, '*.jsonl')}"
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
        raise UserError(f"{source}: has several splits. Pass one of {', '.join(prefix + split for split in loaded)}.")
    return next(iter(loaded.values()))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
