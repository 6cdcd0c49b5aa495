"""What has been generated so far, on disk: a file that only grows, so that a kill costs no more than a batch.

The first line says what the work is (model, prompts, settings); each line after it is one finished item, in order:

    {"part_of": {"command": "generate", "model": "5f0c...", "seed": 1234, ...}}
    {"item": 0, "record": {...}}
    {"item": 1, "record": {...}}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nemo_rao.errors import UserError


class PartFile:
    """An unfinished result, continued where it is there already.

    Args:
        path: the file; its folder is made.
        work: what tells this work from other work; of JSON types. A name that begins with ``digest_of_`` is told
            without its value.

    Attributes:
        records: those of finished items, in order.

    Raises:
        UserError: the file belongs to other work, is damaged, is being written by another process, or cannot be
            written.
    """

    def __init__(self, path: Path, work: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[Any] = []
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise UserError(f"{path}: another process is writing it; wait for it, or choose another name") from None
        try:
            self._continue(work)
        except BaseException:
            self.close()
            raise

    def append(self, records: Iterable[Any]) -> None:
        """Items that are finished, in order. They are on disk when this returns."""
        new = list(records)
        lines = [_line({"item": len(self.records) + at, "record": record}) for at, record in enumerate(new)]
        self._write(b"".join(lines))
        self.records.extend(new)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not written has been told when it was to be
            self._file.close()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _continue(self, work: Mapping[str, Any]) -> None:
        """Reads what is there, and cuts off a last line that was not written to its end."""
        self._file.seek(0)
        kept = 0
        for number, line in enumerate(self._file):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                found, item = (entry["part_of"], None) if number == 0 else (entry["record"], entry["item"])
                if number and item != number - 1:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path} line {number + 1}: was not written by this command, or is damaged; delete the file, "
                    "or choose another name"
                ) from None
            if number == 0:
                self._check_work(found, json.loads(_line(work)))
            else:
                self.records.append(found)
            kept += len(line)
        self._file.truncate(kept)
        if kept == 0:
            self._write(_line({"part_of": work}))

    def _check_work(self, found: Any, work: dict[str, Any]) -> None:
        before = found if isinstance(found, dict) else {}
        for name in work:
            if before.get(name) == work[name]:
                continue
            remedy = f"give what it was begun with, or delete {self.path} to start anew"
            if name.startswith("digest_of_"):
                raise UserError(f"{self.path}: was begun with another {name.removeprefix('digest_of_')}; {remedy}")
            raise UserError(
                f"{self.path}: was begun with {name}={before.get(name)!r}, not {name}={work[name]!r}; {remedy}"
            )

    def _write(self, lines: bytes) -> None:
        with told(self.path, "; what was finished is kept: make room and give the same command again"):
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())


def work_through(
    part: PartFile, items: Sequence[Any], at_once: int, produce: Callable[[Sequence[Any]], list[Any]], label: str
) -> None:
    """Produces the records of all items that ``part`` does not have, and shows how far it is.

    Items are grouped by their numbers, ``at_once`` to a group, whether or not work is resumed within a group: what a
    batch is made of, which the last bits of its logits depend on, is then the same.
    """
    with progress(label, len(items), len(part.records)) as advance:
        while (done := len(part.records)) < len(items):
            start = done - done % at_once
            records = produce(items[start : start + at_once])
            part.append(records[done - start :])
            advance(len(part.records) - done)


@contextlib.contextmanager
def progress(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; called with the number of items just finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """A file that is there with all its text, or is not there (or is the old one)."""
    import gzip

    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        with told(path, "; what was finished is kept: make room and give the same command again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else None
                for piece in [text] if isinstance(text, str) else text:
                    (packed or file).write(piece.encode())
                if packed is not None:
                    packed.close()
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def part_path(path: Path) -> Path:
    """Where unfinished work lies: out.jsonl -> out.jsonl.part.jsonl."""
    return path.with_name(f"{path.name}.part.jsonl")


def check_place(path: Path) -> None:
    """Refuse, while nothing is written, a file that is there already or lies in what is no folder."""
    if path.exists():
        raise UserError(f"{path}: exists already, and is never overwritten; delete it, or give another place")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: cannot be written, {parent} is not a folder; give another place")


@contextlib.contextmanager
def told(path: Path, remedy: str = "; choose another place") -> Iterator[None]:
    """Turns what the file system refuses into a line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){remedy}") from None


def _line(entry: Any) -> bytes:
    return json.dumps(entry, default=str).encode() + b"\n"
