"""One small data set and one starting checkpoint for all tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import FOUR_LAYERS, TINY, make_data, start_checkpoint


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    return start_checkpoint(tmp_path_factory.mktemp("start"), (*TINY, *data))


@pytest.fixture(scope="session")
def deep_start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    """The same with four layers."""
    return start_checkpoint(tmp_path_factory.mktemp("deep_start"), (*FOUR_LAYERS, *data))
