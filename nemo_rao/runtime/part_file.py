"""Resumable work journal: an append-only file of finished items, so that a kill loses at most a batch.

The first line identifies the work (model, input, settings); each further line is one finished item, in order:

    {"part_of": {"command": "generate", "digest_of_model": "5f0c...", "seed": 1234, ...}}
    {"item": 0, "record": {...}}
    {"item": 1, "record": {...}}

A kill or a full disk may leave an incomplete last line, which is removed.

This is for lists of items that one process finishes in order. Two other stores look similar, but need what an
append-only list cannot do: :mod:`nemo_rao.loop.rollout_files` replaces the file of a rollout several times, as its
parts are computed, and removes old ones; :mod:`nemo_rao.scoring.answers` is looked up by question, in any order, by
several processes at once. A study has one record per policy with the inputs of its results
(:mod:`nemo_rao.study.policies`): each of its steps resumes by itself, those with many items through this class.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_errors_at

SYNC_EVERY = 5.0  # seconds; a killed process loses nothing, a power failure what was written after the last sync
_KEPT = ". Finished work is kept: free some space and run the same command again."


def part_path(output: Path) -> Path:
    """Return the path of unfinished work: out.jsonl -> out.jsonl.part.jsonl."""
    return output.with_name(f"{output.name}.part.jsonl")


class PartFile:
    """An unfinished result, resumed if the file exists; locked for this process.

    Args:
        path: the file; its directory is created.
        work: identifies the work, as JSON types. Values whose name begins with ``digest_of_`` are not shown in
            messages.

    Attributes:
        num_records: finished items in it.

    Raises:
        UserError: the file belongs to other work, is damaged, is being written by another process, or cannot be
            written.
    """

    def __init__(self, path: Path, work: Mapping[str, Any]) -> None:
        self.path = path
        self.num_records = 0
        with write_errors_at(path, ". Choose another output."):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer that could not be written would be retried when the file is closed.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            header = _line({"part_of": work})
            self._end = self._read(header)
            with write_errors_at(path):
                self._file.truncate(self._end)
            if self._end == 0:
                self._write(header)
        except BaseException:
            self._file.close()
            raise
        self._synced_at, self._synced_end = time.monotonic(), self._end

    def append(self, records: Iterable[Any]) -> None:
        """Add finished items, in order.

        Raises:
            UserError: the disk is full, or another error occurred; complete items are kept.
        """
        for record in records:
            self._write(_line({"item": self.num_records, "record": record}))
            self.num_records += 1
        if time.monotonic() - self._synced_at > SYNC_EVERY:
            self._sync()

    def records(self) -> Iterator[Any]:
        """Yield the finished items, in order."""
        with open(self.path, "rb") as file:
            for line in itertools.islice(file, 1, 1 + self.num_records):
                yield json.loads(line)["record"]

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file.closed:
            return
        if self._end != self._synced_end:
            with contextlib.suppress(UserError):  # work resumes from what is on disk
                self._sync()
        self._file.close()

    def remove(self) -> None:
        """Remove the file, once the result is complete elsewhere."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        with write_errors_at(self.path, _KEPT):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._end += len(line)

    def _sync(self) -> None:
        with write_errors_at(self.path, _KEPT):
            os.fsync(self._file.fileno())
        self._synced_at, self._synced_end = time.monotonic(), self._end

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: is being written by another process. Wait for it, or choose another output."
            ) from None
        except OSError:  # a file system without locks
            pass

    def _read(self, header: bytes) -> int:
        """Count the finished items. Return the offset after the last of them, or after the header."""
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                # A truncated first line is accepted only if it is a prefix of this work's header.
                if not line.endswith(b"\n") and (number or header.startswith(line)):
                    break
                try:
                    entry = json.loads(line)
                    found, item = (entry["part_of"], None) if number == 0 else (entry["record"], entry["item"])
                    if number and item != number - 1:
                        raise ValueError
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path} line {number + 1}: was not written by this command, or is damaged. Delete the "
                        "file, or choose another output."
                    ) from None
                if number == 0:
                    self._check_work(found, json.loads(header)["part_of"])
                self.num_records = number
                end += len(line)
        return end

    def _check_work(self, found: Any, work: Mapping[str, Any]) -> None:
        before = found if isinstance(found, dict) else {}
        for name in work:
            if before.get(name) == work[name]:
                continue
            remedy = f"Use the previous one, or delete {self.path} to start over."
            if name.startswith("digest_of_"):
                raise UserError(
                    f"{self.path}: was started with a different {name.removeprefix('digest_of_')}. {remedy}"
                )
            raise UserError(
                f"{self.path}: was started with {name}={before.get(name)!r}, not {name}={work[name]!r}. {remedy}"
            )


def _line(entry: Any) -> bytes:
    return json.dumps(entry, default=str).encode() + b"\n"
