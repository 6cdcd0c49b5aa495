"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import gzip
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.errors import UserError
from nemo_rao.runtime.files import write_atomically, written_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_written_in_pieces_too_compressed_by_name_and_readable_like_any_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "deep" / "a.jsonl", "ä\n")
    write_atomically(tmp_path / "deep" / "a.jsonl.gz", (f"{number}\n" for number in range(3)))
    assert (tmp_path / "deep" / "a.jsonl").read_text("utf-8") == "ä\n"
    assert gzip.decompress((tmp_path / "deep" / "a.jsonl.gz").read_bytes()) == b"0\n1\n2\n"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "deep" / "a.jsonl").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names(tmp_path / "deep") == ["a.jsonl", "a.jsonl.gz"]


def test_a_failure_while_the_text_is_made_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def pieces() -> Iterator[str]:
        yield "new"
        raise KeyError("mistake")

    write_atomically(tmp_path / "a", "old")
    with pytest.raises(KeyError):
        write_atomically(tmp_path / "a", pieces())
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_a_full_disk_is_reported_and_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(UserError, match=r"/a(\.gz)?: cannot be written \(File too large\)\. Free some space"):
            write_atomically(tmp_path / name, os.urandom(100_000).hex())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / name).read_text() == "old" and names(tmp_path) == [name]


def test_of_several_files_none_takes_its_name_before_all_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def replacing(source: Any, target: Any) -> None:
        events.append(Path(target).name)
        replace(source, target)

    def syncing(number: int) -> None:
        events.append("synced")
        fsync(number)

    monkeypatch.setattr("nemo_rao.runtime.files.os.replace", replacing)
    monkeypatch.setattr("nemo_rao.runtime.files.os.fsync", syncing)
    with written_atomically(first, second) as (one, two):
        two.write(b"2")
        one.write(b"1")
    assert events == ["synced", "synced", "first", "second"]
    assert (first.read_text(), second.read_text()) == ("1", "2")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nemo_rao.runtime.files.os.fsync", full)
    with pytest.raises(UserError, match="second: cannot be written"), written_atomically(first, second) as files:
        for file in files:
            file.write(b"new")
    assert (first.read_text(), second.read_text()) == ("1", "2") and names(tmp_path) == ["first", "second"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a", "")
