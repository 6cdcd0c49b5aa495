"""Data, initial weights, and CPU runs with which GPU tests compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..train.runs import make_data
from .on_device import SMALL, RunsOnTheCpu

# Files whose tests fork this process. They run first: other tests may initialize CUDA in it.
FORKING = ("test_gpu_model.py", "test_gpu_runs.py")

STEPS = 5
COMPARED = ("gpt_rao", "gpt_dpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent == here and item.path.name not in FORKING)


@pytest.fixture(scope="session")
def cpu() -> Iterator[RunsOnTheCpu]:
    made = RunsOnTheCpu()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return (*SMALL, *make_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...], cpu: RunsOnTheCpu) -> Path:
    """A run of two fine-tuning steps on the CPU, from which the others start."""
    folder = tmp_path_factory.mktemp("start")
    named = (f"exp_manager.exp_dir={folder}", "exp_manager.name=sft", "trainer.max_steps=2", "model.optim.lr=1e-3")
    cpu.start("gpt_sft", [*data, *named])()
    return folder / "sft"


@pytest.fixture(scope="session")
def on_cpu(
    tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...], start: Path, cpu: RunsOnTheCpu
) -> dict[str, Path]:
    """Recipe -> its run of :data:`STEPS` steps in fp32 on the CPU, with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("cpu")
    keep = ("exp_manager.checkpoint_callback_params.every_n_train_steps=3",)
    keep += ("exp_manager.checkpoint_callback_params.save_top_k=-1",)
    common = (*data, *keep, f"model.restore_from_path={start}", f"trainer.max_steps={STEPS}")
    named = {recipe: (f"exp_manager.exp_dir={folder}", f"exp_manager.name={recipe}") for recipe in COMPARED}
    for done in [cpu.start(recipe, [*common, *named[recipe]]) for recipe in COMPARED]:
        done()
    return {recipe: folder / recipe for recipe in COMPARED}
