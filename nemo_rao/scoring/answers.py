"""A judge's answers on disk: question's key -> the texts it answered, oldest first.

SQLite: one file, safe against kills in the middle of a write, usable by several runs at once.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nemo_rao.scoring.scorer import ScoringFailure


class Answers:
    """The file at ``path``, made when it is first asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: sqlite3.Connection | None = None

    def get(self, key: str) -> list[str]:
        found = self._run("SELECT answer FROM answers WHERE key = ? ORDER BY rowid", key)
        return [answer for (answer,) in found]

    def add(self, key: str, answer: str) -> None:
        """On its way to the disk when this returns."""
        # Half a surrogate pair, which JSON may bring, is no text to SQLite.
        self._run("INSERT INTO answers VALUES (?, ?)", key, answer.encode(errors="replace").decode())

    def _run(self, statement: str, *values: str) -> list[tuple[str, ...]]:
        try:
            if self._opened is None:
                self._opened = _open(self.path)
            return self._opened.execute(statement, values).fetchall()
        except (OSError, sqlite3.Error) as error:
            raise ScoringFailure(
                f"file of answers {self.path}: {error}; make room, remove it, or name another file (cache)"
            ) from None

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = sqlite3.connect(path, timeout=60, isolation_level=None)  # each statement for itself
    opened.execute("PRAGMA journal_mode=WAL")
    opened.execute("PRAGMA synchronous=NORMAL")
    opened.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT NOT NULL, answer TEXT NOT NULL)")
    opened.execute("CREATE INDEX IF NOT EXISTS by_key ON answers (key)")
    return opened
