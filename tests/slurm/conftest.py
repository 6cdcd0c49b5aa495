"""A real SLURM for the session, and small runs to launch on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..train.runs import make_data
from .lab import Lab, why_impossible


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    if not request.config.getoption("slurm"):
        pytest.skip("runs jobs on a real SLURM, for minutes, and installs it: make test-slurm")
    if reason := why_impossible():
        pytest.skip(f"no SLURM: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge refuses folders that only their owner may enter
    made = Lab(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))
