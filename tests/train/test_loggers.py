"""What a run's loggers and its checkpoints' ``monitor`` are told: the numbers of ``metrics.jsonl``, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .runs import TINY, run_training, steps


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of what TensorBoard has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for folder in {file.parent for file in run_dir.rglob("events.out.tfevents*")}:
        events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return found


@pytest.mark.parametrize("every", [1, 3])
def test_tensorboard_has_each_logged_step_of_the_metrics_file_after_a_resume_too(
    every: int, data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    given = [*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
    given += ["exp_manager.name=run", "exp_manager.checkpoint_callback_params.every_n_train_steps=3"]
    given += [f"trainer.log_every_n_steps={every}"]
    run_training("gpt_rao", [*given, "trainer.max_steps=3"])
    run_training("gpt_rao", [*given, "trainer.max_steps=6"])
    expected = {step["step"]: step for step in steps(tmp_path / "run")}
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    got = curves(tmp_path / "run")
    of_step = set(expected[6]) - {"step"}
    assert {"loss", "grad_norm", "lr", "rewards/margins", "rao/target_error"} <= of_step <= set(got)
    if every != 1:
        of_step -= {"grad_norm", "lr"}  # NeMo's, which Lightning counts from where a life of the run begins
    for name in of_step:
        # NeMo counts from 0.
        assert set(got[name]) == {step - 1 for step in expected if step % every == 0}, name
        for step, value in got[name].items():
            assert value == pytest.approx(expected[step + 1][name], rel=1e-6), (name, step)


def test_a_metric_of_training_can_decide_which_checkpoint_is_kept(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    keep = {"monitor": "loss", "mode": "max", "save_top_k": 1, "save_last": "false", "every_n_train_steps": 1}
    run_training(
        "gpt_rao",
        [
            *(*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"),
            *("exp_manager.name=run", "trainer.max_steps=4"),
            *(f"exp_manager.checkpoint_callback_params.{name}={value}" for name, value in keep.items()),
        ],
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    worst = max(losses, key=lambda step: losses[step])
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step={worst}"]
