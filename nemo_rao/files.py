"""Files that are whole or not there, and what a file system refuses told in one line.

Not the standard library's ``tempfile``: its files are readable by their owner alone, and stay so under their new name.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from nemo_rao.errors import UserError

MAKE_ROOM = "; make room and give the same command again"


@contextlib.contextmanager
def told(path: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Turns what the file system refuses into a line for the user, about ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){remedy}") from None


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """A file with all its text (UTF-8, compressed where the name ends in .gz); else the old one stays, or none.

    Raises:
        UserError: it cannot be written, a full disk among the reasons.
    """
    with written_atomically(path) as (file,):
        for piece in [text] if isinstance(text, str) else text:
            file.write(piece.encode())


@contextlib.contextmanager
def written_atomically(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Files to write to, under temporary names. When all are on the disk they take their own names, in this order.

    If anything fails before that, nothing is left of them. Their folders are made.

    Raises:
        UserError: one cannot be written; it names the last.
    """
    # Drawn, not the process's number: processes on several nodes may write into one folder.
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    with told(paths[-1]):
        try:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as opened:
                yield [
                    opened.enter_context(_synced(name, path.suffix == ".gz"))
                    for name, path in zip(temporary, paths, strict=True)
                ]
            for name, path in zip(temporary, paths, strict=True):
                os.replace(name, path)
        finally:
            for name in temporary:
                with contextlib.suppress(OSError):
                    name.unlink(missing_ok=True)


@contextlib.contextmanager
def _synced(path: Path, packed: bool) -> Iterator[IO[bytes]]:
    """A file to write to, on the disk when it is left; ``packed``: compressed, alike for the same content."""
    with open(path, "wb") as plain:
        if packed:
            with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as file:
                yield file  # type: ignore[misc]
        else:
            yield plain
        plain.flush()
        os.fsync(plain.fileno())


def check_place(path: Path) -> None:
    """Refuse, while nothing is written, a file that is there already or lies in what is no folder."""
    if path.exists():
        raise UserError(f"{path}: exists already, and is never overwritten; delete it, or give another place")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: cannot be written, {parent} is not a folder; give another place")
