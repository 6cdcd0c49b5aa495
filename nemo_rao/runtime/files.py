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

MAKE_ROOM = ". Free some space and run the same command again."


@contextlib.contextmanager
def write_errors_at(path: Path, remedy: str = MAKE_ROOM) -> Iterator[None]:
    """Report errors of the file system as a :class:`UserError` about ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}){remedy}") from None


def write_atomically(path: Path, text: str | Iterable[str]) -> None:
    """Write a file with all its text (UTF-8, compressed if the name ends in .gz), or leave the old one unchanged.

    Raises:
        UserError: it cannot be written, for example because the disk is full.
    """
    with written_atomically(path) as (file,):
        for piece in [text] if isinstance(text, str) else text:
            file.write(piece.encode())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object per line, ignoring a truncated last line; empty if absent.

    Only newlines end a line: ``str.splitlines`` would also split at U+2028 and others inside a JSON string.
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
    """Open files for writing under temporary names. Once all are on disk, they are renamed in this order.

    If anything fails before that, no file is left. Parent directories are created.

    Raises:
        UserError: one cannot be written; it names the last.
    """
    # Random, not the process id: processes on several nodes may write to one directory.
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
    """Create a directory to write to under a temporary name. Once its files are on disk, it is renamed; if another
    process was faster, that one's directory is kept and this one removed.

    If anything fails before that, nothing is left. Parent directories are created.

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
    """Remove partial files of killed processes from a directory. No process may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def remove_folder(path: Path, *, unfinished: bool) -> None:
    """Remove a directory if allowed; no reader sees a part of it.

    Args:
        unfinished: also remove its partial copies of killed processes. No process may be writing it.
    """
    removed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.rename(removed)
    for folder in path.parent.glob(f".{path.name}.*.tmp") if unfinished else [removed]:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Admit one process; others with the same path wait until it has left or died. Parent directories of the path exist
    meanwhile, and are removed afterwards if they are empty.

    Not the package ``filelock``: on file systems without locks it retries forever, while this one does not wait.

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
            # Closing alone would leave the lock with processes that were forked meanwhile.
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)
            held.callback(lock.unlink, missing_ok=True)
            alone = True
        yield alone


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """Remove empty directories, inner ones first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _locked(path: Path, waiting: Callable[[], None]) -> IO[bytes]:
    """Return the open file, locked for this process until it is closed."""
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
        file.close()  # its previous holder has removed it: newcomers lock a new file


@contextlib.contextmanager
def _synced(path: Path, packed: bool) -> Iterator[IO[bytes]]:
    """Open a file that is on disk when the block ends; ``packed``: compressed, deterministically."""
    with open(path, "wb") as plain:
        if packed:
            with gzip.GzipFile(filename="", mode="wb", fileobj=plain, mtime=0) as file:
                yield file  # type: ignore[misc]
        else:
            yield plain
        plain.flush()
        os.fsync(plain.fileno())


def check_place(path: Path) -> None:
    """Refuse an output file that exists or cannot be created, before any work is done."""
    if path.exists():
        raise UserError(f"{path}: exists, and is never overwritten. Delete it, or choose another path.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{path}: cannot be written, because {parent} is not a directory. Choose another path.")
