"""A run's loggers and its checkpoints' ``monitor`` get the numbers of ``metrics.jsonl``, step by step."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config import monitor
from nemo_rao.config.compose import compose

from ..megatron_ranks import import_once
from .runs import TINY, run_training


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


class Wandb(types.ModuleType):
    """Stands for W&B: writes down what it is given, once the run is finished."""

    def __init__(self, path: Path) -> None:
        super().__init__("wandb")
        self._path = path
        self._lines: list[str] = []

    def init(self, *, dir: str, project: str, name: str) -> Wandb:
        assert (Path(dir).name, project, name) == ("run", "mine", "run")
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._lines.append(json.dumps({"step": step, **values}) + "\n")

    def finish(self) -> None:
        with self._path.open("a") as file:
            file.writelines(self._lines)


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_every_logger_has_the_numbers_of_the_metrics_file_at_the_same_steps_after_a_resume_too(
    every: int, data: tuple[str, ...], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_once()  # with the package itself, if it is there
    monkeypatch.setitem(sys.modules, "wandb", Wandb(tmp_path / "recorded.jsonl"))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(data[0].partition("=")[2]).read_text().splitlines(keepends=True)[:6]))
    given = [*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
    given += ["exp_manager.name=run", "exp_manager.checkpoint_callback_params.every_n_train_steps=3"]
    given += ["exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs.project=mine"]
    given += [f"trainer.log_every_n_steps={every}", f"data.validation_path={few}", "trainer.val_check_interval=2"]
    run_training("gpt_rao", [*given, "trainer.max_steps=3"])
    run_training("gpt_rao", [*given, "trainer.max_steps=6"])

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    training = {record["step"]: record for record in records if "loss" in record}
    validation = {record["step"]: record for record in records if "val/loss" in record}
    assert list(training) == [1, 2, 3, 4, 5, 6]
    assert list(validation) == [0, 2, 3, 4, 6]
    assert {"loss", "grad_norm", "lr", "rewards/margins", "rao/target_error"} <= set(training[6])
    expected: dict[str, dict[int, float]] = {}
    for steps_logged, by_step in ((lambda step: step % every == 0, training), (lambda step: True, validation)):
        for step, record in by_step.items():
            for name in set(record) - {"step"}:
                if steps_logged(step):
                    expected.setdefault(name, {})[step] = record[name]

    recorded: dict[str, dict[int, float]] = {}
    for line in (tmp_path / "recorded.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in set(record) - {"step"}:
            recorded.setdefault(name, {})[record["step"]] = record[name]
    assert recorded == expected
    on_tensorboard = curves(tmp_path / "run")
    assert set(on_tensorboard) == set(expected), "nothing under another count"
    for name, by_step in on_tensorboard.items():
        assert by_step == pytest.approx(expected[name], rel=1e-6), name

    # What a checkpoint's monitor may name, before the run, is what the run has reported.
    reported = monitor._reported(compose("gpt_rao", given))
    assert reported == set(expected)


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
