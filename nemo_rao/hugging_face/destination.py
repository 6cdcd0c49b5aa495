"""Output directory of a conversion: checked in advance and written atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_rao.errors import UserError


def check_destination(path: str, num_bytes: int, key: str) -> Path:
    """Check the output directory and return its absolute path.

    Args:
        num_bytes: approximate size of the output.
        key: name of the argument, for messages.

    Raises:
        UserError: it exists and is not empty, is not writable, or the disk has too little space.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{key}: {folder} exists and is not an empty directory. Pass a new one, or remove it.")
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        what = "is not writable" if present.is_dir() else "is not a directory"
        raise UserError(f"{key}: {present} {what}. Pass another directory.")
    free = shutil.disk_usage(present).free
    if free < num_bytes:
        raise UserError(
            f"{key}: {present} has {free / 1e9:.2f} GB free, but {num_bytes / 1e9:.2f} GB are needed. Free some "
            "space, or pass a directory on another disk."
        )
    return folder


@contextlib.contextmanager
def written_whole(folder: Path, key: str) -> Iterator[Path]:
    """Yield a temporary directory next to ``folder`` that is renamed to it at the end, or removed on failure.

    Raises:
        UserError: the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        os.rename(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (reason := _no_room(error)) is not None:
            raise UserError(
                f"{key}: {folder} could not be written ({reason}), and the partial output was removed. Free some "
                "space, or pass a directory on another disk."
            ) from None
        raise


_NO_ROOM = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def _no_room(error: BaseException | None) -> str | None:
    """Reason if an error was caused by lack of disk space, else ``None``: libraries wrap such errors differently."""
    while error is not None:
        for number, text in _NO_ROOM.items():
            if (isinstance(error, OSError) and error.errno == number) or text in str(error):
                return text
        if "inline_container" in str(error) and "unexpected pos" in str(error):  # torch's writer gives no other hint
            return "a write was cut short"
        if "Worker failure: " in str(error):  # megatron-core 0.19's writer gives no other hint
            return "a writer process failed"
        error = error.__cause__ or error.__context__
    return None
