"""One small data set and one starting checkpoint for all tests of whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import TINY, make_data, run_training


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    """A run of two fine-tuning steps, whose checkpoint the others start from."""
    folder = tmp_path_factory.mktemp("start")
    run_training(
        "gpt_sft", [*TINY, *data, f"exp_manager.exp_dir={folder}", "exp_manager.name=sft", "trainer.max_steps=2"]
    )
    return folder / "sft"
