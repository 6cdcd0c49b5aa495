"""What is scored so far: a line a row, appended in order, from which a run that was stopped goes on.

    OUTPUT.part.jsonl:  {"nemo_rao_score": 1, "input": ..., "scorers": {...}}     what it belongs to
                        {"prompt": ..., "responses": [{"content": ..., NAME: score, ...}, ...]}
                        ...

A kill or a full disk may leave half a line at the end; it is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.scoring.scorer import Scores, ScoringFailure

VERSION = 1
SYNC_EVERY = 5.0  # seconds


def part_path(output: Path) -> Path:
    return output.with_name(output.name + ".part.jsonl")


class PartFile:
    """The part file of an output, locked for this process.

    Attributes:
        num_rows: rows in it.
        existed: it was continued.
    """

    def __init__(self, path: Path, input_digest: str, scorers: Mapping[str, Any]) -> None:
        """
        Args:
            path: made, with its folder, if it is not there.
            input_digest: of the input's content.
            scorers: column -> its scorer's identity, as JSON.

        Raises:
            UserError: it belongs to another input or to other scorers, another process has it, or it cannot be
                written to.
        """
        self.path = path
        header = {"nemo_rao_score": VERSION, "input": input_digest, "scorers": dict(scorers)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not buffered: a buffer that could not be written would be tried again when the file is closed.
            self._file = open(path, "r+b" if path.exists() else "x+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror}); choose another output") from None
        try:
            self._lock()
            self.num_rows, end = self._rows_there(json.loads(json.dumps(header)))
            self.existed = end > 0
            self._file.truncate(end)
            self._file.seek(end)
            if not self.existed:
                self._write(_line(header))
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def append(self, rows: Sequence[Row], scores: Sequence[Mapping[str, Scores]]) -> None:
        """Adds rows, each with its responses' scores by column.

        Raises:
            ScoringFailure: the disk is full, or another fault of it; what was there before is kept.
        """
        for row, columns in zip(rows, scores, strict=True):
            self._write(_line(record(row, columns)))
            self.num_rows += 1
        if time.monotonic() - self._synced > SYNC_EVERY:
            self.sync()

    def records(self) -> Iterator[dict[str, Any]]:
        """The rows, in order."""
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                yield json.loads(line)

    def sync(self) -> None:
        with self._told():
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def _write(self, line: bytes) -> None:
        start = self._file.tell()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise self._failure(error) from None

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> ScoringFailure:
        return ScoringFailure(f"{self.path}: cannot be written ({error.strerror}); make room")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another nemo-rao score is writing it; wait for it, or choose another output"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _rows_there(self, header: Mapping[str, Any]) -> tuple[int, int]:
        """(whole rows, byte after the last of them) of the file as it is; (0, 0) for one without a whole header."""
        self._file.seek(0)
        rows, end = -1, 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    found = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    found = None
                if rows < 0 and (found is None or not isinstance(found, dict) or "nemo_rao_score" not in found):
                    # A first line cut short is this run's own, before its first row.
                    if line.endswith(b"\n") or not _line(header).startswith(line):
                        raise UserError(
                            f"{self.path}: is no part of a nemo-rao score; remove it, or choose another output"
                        )
                    return 0, 0
                if found is None:
                    break
                if rows < 0:
                    self._require(found, header)
                rows += 1
                end += len(line)
        return max(rows, 0), end

    def _require(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        """Refuses a part file of other scores, and says what differs."""
        if found == header:
            return
        before, now = found.get("scorers", {}), header["scorers"]
        if found.get("nemo_rao_score") != VERSION:
            what = "by another version of nemo-rao"
        elif found.get("input") != header["input"]:
            what = "for an input of other content"
        elif list(before) != list(now):
            what = f"with the columns {', '.join(before)}, not {', '.join(now)}"
        else:
            names = ", ".join(name for name in now if before[name] != now[name])
            what = f"when scorer {names} was another (its file or its keys have changed)"
        raise UserError(f"{self.path}: was begun {what}; remove this file to score anew, or choose another output")


def record(row: Row, columns: Mapping[str, Scores]) -> dict[str, Any]:
    """The row in the canonical format, without ``reward``."""
    responses = [
        {"content": response.content} | {name: scores[number] for name, scores in columns.items()}
        for number, response in enumerate(row.responses)
    ]
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt]
    ranked = {"ranked": True} if row.ranked else {}
    return {"prompt": prompt, "responses": responses} | ranked


def _line(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()
