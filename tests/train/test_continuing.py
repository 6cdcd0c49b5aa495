"""The same command, or nearly the same, over an existing run: what is refused, applied, left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.cli import main

from .runs import TINY, in_fork, run_training, steps


def overrides(folder: Path, data: tuple[str, ...], start: Path, *extra: str) -> list[str]:
    return [*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={folder}", *extra]


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def run(arguments: list[str], code: int) -> None:
    assert main(arguments) == code


def test_a_finished_run_is_left_alone_and_one_that_is_made_longer_takes_the_steps_of_a_longer_run(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    epochs = "trainer.max_epochs={}"
    given = overrides(tmp_path, data, start, "exp_manager.name=run", "model.global_batch_size=32", epochs.format(1))
    run_training("gpt_rao", given)
    assert f"starting from {start}/checkpoints/" in capfd.readouterr().out
    before = files(tmp_path)
    in_fork(run, ["train", "--config-name", "gpt_rao", *given], 0)
    assert "run: finished at step 2 of 2: nothing to do" in capfd.readouterr().out
    assert files(tmp_path) == before

    in_fork(run, ["train", "--config-name", "gpt_rao", *given, "model.optim.lr=1e-5"], 2)
    assert "model.optim.lr from 0.001 to 1e-05" in capfd.readouterr().err
    assert files(tmp_path) == before

    run_training("gpt_rao", [*given, epochs.format(3), "trainer.max_steps=100"])
    said = capfd.readouterr().out
    assert "trainer.max_steps=100, but trainer.max_epochs=3 ends the run after step 6 (64 prompts" in said
    assert "step=2-last, step 2 of 6\n" in said and "trainer.max_epochs 1 -> 3" in said
    run_training("gpt_rao", [*given, "exp_manager.name=whole", epochs.format(3)])
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["finished_at"] == record["max_steps"] == 6 and record["start_from"].startswith(
        f"{start}/checkpoints/"
    )


def test_changes_that_are_asked_for_take_effect_and_are_recorded_but_no_reference_is_made_of_trained_weights(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tmp_path, data, start, "exp_manager.name=run", "trainer.max_steps=2", "trainer.max_epochs=null")
    run_training("gpt_rao", given)
    longer = [*given, "trainer.max_steps=4", "exp_manager.resume_with_changes=true"]
    run_training("gpt_rao", [*longer, "model.optim.lr=1e-5", "trainer.gradient_clip_val=0.5"])
    assert [step["lr"] for step in steps(tmp_path / "run")] == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])
    (line,) = (tmp_path / "run/changes.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 2
    assert {change["key"]: change["new"] for change in json.loads(line)["changes"]}.items() >= {
        ("model.optim.lr", 1e-5),
        ("trainer.gradient_clip_val", 0.5),
    }

    # Other data, though asked for, would need the reference's log-probabilities of it.
    train = Path(data[0].partition("=")[2])
    grown = tmp_path / "grown.jsonl"
    rows = train.read_text().splitlines()
    grown.write_text("\n".join([*rows, rows[0]]) + "\n")
    settled = [*longer, "model.optim.lr=1e-5", "trainer.gradient_clip_val=0.5", "trainer.max_steps=6"]
    capfd.readouterr()
    recorded = {name: (tmp_path / "run" / name).read_text() for name in ("recipe.yaml", "data.json", "changes.jsonl")}
    in_fork(run, ["train", "--config-name", "gpt_rao", *settled, f"data.train_path={grown}"], 2)
    said = capfd.readouterr().err
    assert "the reference log-probabilities of the training data that this run started with" in said
    shutil.rmtree(tmp_path / "reference")
    in_fork(run, ["train", "--config-name", "gpt_rao", *settled], 2)
    assert "is missing, and has the reference log-probabilities" in capfd.readouterr().err
    newest = last_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name == "step=4-last"
    assert recorded == {name: (tmp_path / "run" / name).read_text() for name in recorded}, (
        "no refused start is recorded"
    )
