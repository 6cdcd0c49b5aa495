"""A judge's answers on disk: key of a question -> its answers, oldest first.

Stored in SQLite: one file, safe against kills during a write, usable by several runs at once. Not a
:class:`nemo_rao.runtime.part_file.PartFile`, which has one writer and items in order.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from nemo_rao.scoring.chat import CUT_OFF, ChatAnswer
from nemo_rao.scoring.scorer import ScoringFailure

# Files of early versions have a table `answers` that does not record truncation; it is ignored.
_TABLE = "whole_and_cut_answers"
_PROBLEMS = {0: "", 1: CUT_OFF}  # values of early versions, which only recorded truncation


class Answers:
    """The file at ``path``, created on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: sqlite3.Connection | None = None

    def get(self, key: str) -> list[ChatAnswer]:
        found = self._run(f"SELECT answer, cut FROM {_TABLE} WHERE key = ? ORDER BY rowid", key)
        return [ChatAnswer(text, _PROBLEMS.get(cut, cut)) for text, cut in found]

    def add(self, key: str, answer: ChatAnswer) -> None:
        """Add an answer. It is committed when this returns."""
        # SQLite rejects half a surrogate pair, which JSON may contain.
        text = answer.text.encode(errors="replace").decode()
        self._run(f"INSERT INTO {_TABLE} VALUES (?, ?, ?)", key, text, answer.problem)

    def _run(self, statement: str, *values: str) -> list[tuple[Any, ...]]:
        try:
            if self._opened is None:
                self._opened = _open(self.path)
            return self._opened.execute(statement, values).fetchall()
        except (OSError, sqlite3.Error) as error:
            raise ScoringFailure(
                f"judge answers {self.path}: {error}. Free some space, remove the file, or set cache to another file."
            ) from None

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = sqlite3.connect(path, timeout=60, isolation_level=None)  # autocommit
    opened.execute("PRAGMA journal_mode=WAL")
    opened.execute("PRAGMA synchronous=NORMAL")
    columns = "key TEXT NOT NULL, answer TEXT NOT NULL, cut INTEGER NOT NULL"  # cut: ChatAnswer.problem, or as above
    opened.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE} ({columns})")
    opened.execute(f"CREATE INDEX IF NOT EXISTS {_TABLE}_by_key ON {_TABLE} (key)")
    return opened
