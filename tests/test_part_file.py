"""Unfinished work on disk: continued after a kill, kept on a full disk, never another's."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.errors import UserError
from nemo_rao.runtime.part_file import PartFile, part_path

WORK = {"command": "test", "seed": 1, "digest_of_input": "abc"}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A part of two items."""
    path = part_path(tmp_path / "deep" / "out.jsonl")
    with PartFile(path, WORK) as part:
        part.append([{"text": "ä\n"}, [2, None]])
    assert path.name == "out.jsonl.part.jsonl" and path.read_bytes().count(b"\n") == 3
    return path


def test_what_is_there_is_continued_and_half_a_line_cut_off(begun: Path) -> None:
    whole = begun.read_bytes()
    for half in (b"", b"{", b'{"item": 2, "record": 1}', b"\0\0\0"):
        begun.write_bytes(whole + half)
        with PartFile(begun, WORK) as part:
            assert part.num_records == 2 and list(part.records()) == [{"text": "ä\n"}, [2, None]]
            part.append([3])
            assert part.num_records == 3 and list(part.records()) == [{"text": "ä\n"}, [2, None], 3]
        assert begun.read_bytes() == whole + b'{"item": 2, "record": 3}\n'


def test_a_header_cut_short_is_begun_anew_and_a_removed_part_is_gone(begun: Path) -> None:
    header = begun.read_bytes().splitlines()[0]
    for cut in (b"", header[:1], header):
        begun.write_bytes(cut)
        with PartFile(begun, WORK) as part:
            assert part.num_records == 0 and begun.read_bytes() == header + b"\n"
            part.remove()
        assert not begun.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: "my diary", "line 1: was not written by this command, or is damaged"),
        (lambda text: "my diary\n", "line 1: was not written"),
        (lambda text: '{"part_of": {"seed": 7', "line 1: was not written"),  # a header cut short, but not this one
        (lambda text: text.replace('"item": 0', '"item": 5'), "line 2: was not written"),
        (lambda text: text.replace('{"item": 1', '"item": 1'), "line 3: was not written"),
        (lambda text: text.replace("abc", "abd"), "was started with a different input. Use the previous one"),
        (lambda text: text.replace('"seed": 1', '"seed": 2'), "was started with seed=2, not seed=1. "),
        (lambda text: text.replace('"seed": 1, ', ""), "was started with seed=None, not seed=1. "),
    ],
)
def test_what_is_another_work_or_damaged_is_refused_and_left_as_it_is(
    begun: Path, change: Callable[[str], str], said: str
) -> None:
    begun.write_text(change(begun.read_text()))
    before = begun.read_bytes()
    with pytest.raises(UserError) as refusal:
        PartFile(begun, WORK)
    assert str(refusal.value).startswith(str(begun)) and said in str(refusal.value)
    assert "delete" in str(refusal.value).lower() and begun.read_bytes() == before


def test_a_part_that_another_process_writes_is_left_alone(begun: Path) -> None:
    before = begun.read_bytes()
    with PartFile(begun, WORK), pytest.raises(UserError, match="is being written by another process"):
        PartFile(begun, WORK)
    PartFile(begun, WORK).close()
    assert begun.read_bytes() == before


def test_a_full_disk_is_reported_and_whole_items_are_kept(begun: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PartFile(begun, WORK) as part:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (begun.stat().st_size + 200, limits[1]))
            with pytest.raises(UserError, match=r"cannot be written \(File too large\)\. Finished work is kept"):
                part.append(["x" * 50] * 5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert part.num_records == 4 and begun.read_bytes().count(b"\n") == 5 and begun.read_bytes().endswith(b"\n")
        part.append(["more"])
        assert list(part.records())[2:] == ["x" * 50, "x" * 50, "more"]


def test_items_are_on_the_disk_after_some_seconds_and_when_the_file_is_closed(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def syncing(number: int) -> None:
        synced.append(begun.stat().st_size)
        fsync(number)

    monkeypatch.setattr("nemo_rao.runtime.part_file.os.fsync", syncing)
    with PartFile(begun, WORK) as part:
        part.append([1])
        assert synced == []
        monkeypatch.setattr("nemo_rao.runtime.part_file.SYNC_EVERY", 0.0)
        part.append([2])
        assert synced == [begun.stat().st_size]
        monkeypatch.undo()
        monkeypatch.setattr("nemo_rao.runtime.part_file.os.fsync", syncing)
        part.append([3])
    assert synced[1:] == [begun.stat().st_size]
