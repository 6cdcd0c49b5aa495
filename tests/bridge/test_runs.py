"""Runs on Bridge's engine, as far as tests/train, which runs on either, does not have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ..engines import needs_bridge
from ..train.runs import FOUR_LAYERS, NO_CHECKPOINTS, in_fork, make_data, parallel, run_training, steps

pytestmark = needs_bridge


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


def _start_without_prefix(overrides: list[str]) -> None:
    from nemo_rao.config.compose import compose
    from nemo_rao.mcore import checkpoint
    from nemo_rao.training.train import train

    checkpoint.PREFIX = ""
    train(compose("gpt_sft", overrides))


def test_a_checkpoint_as_bridge_itself_lays_it_out_starts_a_run_under_any_parallelism(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    common = [*FOUR_LAYERS, *data, f"exp_manager.exp_dir={tmp_path}"]
    begun = [*common, "exp_manager.name=sft", "trainer.max_steps=2"]
    in_fork(_start_without_prefix, begun)
    native = tmp_path / "native" / "iter_0000002"
    shutil.copytree(tmp_path / "sft/checkpoints/step=2-last/weights", native)
    (native.parent / "latest_checkpointed_iteration.txt").write_text("2")
    run_training("gpt_sft", [*common, "exp_manager.name=same", "trainer.max_steps=2"])  # with the usual names
    courses = []
    for name, start, layout in (
        ("usual", tmp_path / "same", ()),
        ("native", native.parent, ()),
        ("split", native, (*parallel(2, 2, 1), "model.sequence_parallel=true")),
    ):
        given = [*common, *NO_CHECKPOINTS, *layout, f"exp_manager.name={name}", f"model.restore_from_path={start}"]
        run_training("gpt_rao", [*given, "trainer.max_steps=3"])
        courses.append(steps(tmp_path / name))
    assert courses[0] == courses[1]
    for one, same in zip(courses[0], courses[2], strict=True):
        for key, value in one.items():
            if not (key == "rewards/accuracies" and one["step"] == 1):
                assert same[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
