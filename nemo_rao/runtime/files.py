"""Atomic writes of files and directories, and file system errors reported in one line.

Not the standard library's ``tempfile``: its files are readable only by their owner, even after they are renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nemo_rao.errors import UserError

MAKE_ROOM = "; make room and give the same command again"


@contextlib.contextmanager
def write_errors_at(path: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Report errors of the file system as a :class:`UserError` about ``path``."""
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


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with a JSON object per line, without a last line that a kill cut short; empty if absent.

    Lines end at newlines alone: ``str.splitlines`` would also split at U+2028 and others inside a JSON string.
    """
    records = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return records


@contextlib.contextmanager
def written_atomically(*paths: Path) -> Iterator[list[IO[bytes]]]:
    """Files to write to, under temporary names. When all are on the disk they take their own names, in this order.

    If anything fails before that, nothing is left of them. Their folders are made.

    Raises:
        UserError: one cannot be written; it names the last.
    """
    # Drawn, not the process's number: processes on several nodes may write into one folder.
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in paths]
    with write_errors_at(paths[-1]):
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
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """A folder to write files to, under a temporary name. When they are on the disk it takes its own name; where
    another process was first, that one's folder stays, and this one is dropped.

    If anything fails before that, nothing is left of it. The folders above it are made.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with write_errors_at(path, ""):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_unfinished_files(folder: Path) -> None:
    """Remove what killed processes have left of files in the folder. Only where nobody is writing one."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_folder(path: Path, *, unfinished: bool) -> None:
    """Remove a folder where that is allowed; no reader sees half of it.

    Args:
        unfinished: also what killed processes have left of it. Only where nobody is writing it.
    """
    removed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.rename(removed)
    for folder in path.parent.glob(f".{path.name}.*.tmp") if unfinished else [removed]:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Let one process in; those that come with the same path wait until it has left, or has died. The folders above
    the path are there meanwhile; nothing is left of them where they stay empty.

    Not the package ``filelock``: on file systems without locks it tries for ever; here nobody waits there.

    Args:
        waiting: called once by a process that has to wait.

    Returns:
        whether this process is alone.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        alone = False
        with contextlib.suppress(OSError):
            held.callback(_remove_if_empty, [folder for folder in lock.parents if not folder.exists()])
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(_locked(lock, waiting))
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # closing alone leaves it with what was forked meanwhile
            held.callback(lock.unlink, missing_ok=True)
            alone = True
        yield alone


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """The inner ones first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _locked(path: Path, waiting: Callable[[], None]) -> IO[bytes]:
    """The open file, locked for this process until it is closed."""
    while True:
        file = open(path, "ab")  # noqa: SIM115
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # who had it has removed it: those who come now lock another


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
