"""Imports that the garbage collector passes over, before and after."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from nemo_rao.runtime.collector import uncollected_imports


def test_what_was_imported_is_frozen_and_the_collector_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_once.py").write_text("held = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with uncollected_imports():
        assert not gc.isenabled()
        import imported_once
    frozen = gc.get_freeze_count()
    assert gc.isenabled() and frozen >= before + 1000
    assert not {id(one) for one in imported_once.held} & {id(one) for one in gc.get_objects()}
    made = [[] for _ in range(1000)]
    with uncollected_imports():
        import imported_once
    # Nothing was imported: what was made since is seen. Of what is frozen, some may have ended meanwhile.
    assert gc.get_freeze_count() <= frozen
    assert {id(one) for one in made} <= {id(one) for one in gc.get_objects()}
    monkeypatch.delitem(sys.modules, "imported_once")
