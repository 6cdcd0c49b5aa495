"""The folder that a conversion makes: looked at before, and there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nemo_rao.errors import UserError


def check_destination(path: str, num_bytes: int, key: str) -> Path:
    """The folder that is to be made, absolute.

    Args:
        num_bytes: what will be written there, about.
        key: the argument's name.

    Raises:
        UserError: there is something already, or no room, or it cannot be written.
    """
    folder = Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{key}: {folder} exists and is not an empty folder; name a new one, or remove it")
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        what = "cannot be written to" if present.is_dir() else "is not a folder"
        raise UserError(f"{key}: {present} {what}; name another folder")
    free = shutil.disk_usage(present).free
    if free < num_bytes:
        raise UserError(
            f"{key}: {present} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB will be written; free some "
            "space, or name a folder on another disk"
        )
    return folder


@contextlib.contextmanager
def written_whole(folder: Path, key: str) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which takes its name at the end, or is removed if anything fails.

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
                f"{key}: {folder} could not be written ({reason}), and nothing is left of it; free some space, or name "
                "a folder on another disk"
            ) from None
        raise


_NO_ROOM = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def _no_room(error: BaseException | None) -> str | None:
    """Why nothing more can be written, if that is what an error comes from: libraries wrap it each in their own way."""
    while error is not None:
        for number, text in _NO_ROOM.items():
            if (isinstance(error, OSError) and error.errno == number) or text in str(error):
                return text
        if "inline_container" in str(error) and "unexpected pos" in str(error):  # all that torch's writer says
            return "a write was cut short"
        if "Worker failure: " in str(error):  # all that megatron-core 0.19's writer says
            return "a process that writes has failed"
        error = error.__cause__ or error.__context__
    return None
