"""Runs on Bridge's engine, as far as tests/train, which runs on either, does not have them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from ..train.runs import (
    FOUR_LAYERS,
    NO_CHECKPOINTS,
    _train,
    in_fork,
    last_stored,
    make_data,
    parallel,
    run_training,
    same,
    steps,
)
from ..train.test_resume import overrides

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None or importlib.util.find_spec("nemo") is not None,
    reason="Megatron-Bridge is not installed",
)


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
    for one, split in zip(courses[0], courses[2], strict=True):
        for key, value in one.items():
            if not (key == "rewards/accuracies" and one["step"] == 1):
                assert split[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def _train_and_die_writing(step: int, given: Sequence[str]) -> None:
    """Rank 0 is killed when the tensors of step's checkpoint are written in part, and their index is not there yet."""
    from megatron.core import dist_checkpointing

    save = dist_checkpointing.save

    def killing(content: object, folder: str, *arguments: object, **keywords: object) -> None:
        save(content, folder, *arguments, **keywords)
        if f"step={step}" in folder and os.environ["RANK"] == "0":
            (Path(folder) / ".metadata").unlink()
            part = max(Path(folder).glob("*.distcp"), key=lambda path: path.stat().st_size)
            os.truncate(part, part.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    dist_checkpointing.save = killing
    _train("gpt_rao", given)


def test_a_run_killed_while_it_writes_a_checkpoint_continues_bitwise_from_the_one_before(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    undisturbed, killed = (
        [*overrides(tmp_path / name, data, tmp_path, *parallel(2, 1, 1)), "model.restore_from_path=null"]
        for name in ("undisturbed", "killed")
    )
    run_training("gpt_rao", undisturbed)
    with pytest.raises(AssertionError, match="rank 0 was killed by SIGKILL"):
        in_fork(_train_and_die_writing, 6, killed)
    assert len(steps(tmp_path / "killed/run")) == 6
    assert {path.name for path in (tmp_path / "killed/run/checkpoints").iterdir()} > {"step=6", "step=6-unfinished"}
    run_training("gpt_rao", killed)
    assert steps(tmp_path / "killed/run") == steps(tmp_path / "undisturbed/run")
    assert same(last_stored(tmp_path / "killed/run"), last_stored(tmp_path / "undisturbed/run"))
    assert not list((tmp_path / "killed/run/checkpoints").glob("*-unfinished"))
