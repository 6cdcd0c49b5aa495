"""A sweep trains each run in a process of its own, shares one reference pass, and goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.checkpoint.run_records import write_run
from nemo_rao.cli import main
from nemo_rao.config.derived import run_dir
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import RankFailure, UserError
from nemo_rao.training.loading import LoadedData

from ..engines import ENGINE
from .runs import TINY, in_fork, steps

Train = Callable[[RunConfig], None]


def rows(folder: Path, name: str = "gpt_dpo") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.sweep.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, int]:
    """Files with the time of their last change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_two_betas_from_one_start_share_one_reference_pass_and_are_trained_once(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "-m",
        "--config-name",
        "gpt_dpo",
        *TINY,
        "exp_manager.draw_curves=true",
        *data,
        f"model.restore_from_path={start}",
    ]
    command += [f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=2", "model.dpo.beta=0.05,0.5"]
    in_fork(sweep, command, 0)
    folders = [tmp_path / "gpt_dpo-beta=0.05", tmp_path / "gpt_dpo-beta=0.5"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(folder.name for folder in folders),
        "gpt_dpo.sweep.jsonl",
        "reference",
        "tokenised",
    }
    assert len(list((tmp_path / "reference").iterdir())) == 1
    assert len(list((tmp_path / "tokenised").iterdir())) == 1
    found = rows(tmp_path)
    assert [(row["overrides"], row["state"], row["step"]) for row in found] == [
        ({"model.dpo.beta": 0.05}, "finished", 2),
        ({"model.dpo.beta": 0.5}, "finished", 2),
    ]
    for row, folder in zip(found, folders, strict=True):
        assert row.items() >= steps(folder)[-1].items()
    assert found[0]["loss"] != found[1]["loss"]
    table = capfd.readouterr().out
    assert all(word in table for word in ("│ 0.05 │", "│ 0.5  │", "loss", "rewards/margins", "rewards/accuracies"))

    before = contents(tmp_path)
    in_fork(sweep, command, 0)
    assert capfd.readouterr().out.count("finished before") == 2
    after = contents(tmp_path)
    assert {path for path in before | after if before.get(path) != after.get(path)} == {
        str(tmp_path / "gpt_dpo.sweep.jsonl")
    }
    assert rows(tmp_path) == found


def sweep(command: list[str], code: int) -> None:
    assert main(command) == code


# ------------------------------------------------ how a run may end, with a training that only leaves what a run leaves


@pytest.fixture
def run_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs ``nemo-rao train -m`` over three betas, 1, 2 and 3, with ``train`` in the place of training."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"nemo_rao.engines.{ENGINE}.engine.load", lambda: True)
    monkeypatch.setattr("nemo_rao.training.devices.select_device", lambda config: None)
    data = PreferenceData([])
    importlib.import_module("nemo_rao.training.prepare")  # which would keep what stands there now
    monkeypatch.setattr("nemo_rao.training.loading.load_data", lambda config: LoadedData(data, None, 300, 0))
    monkeypatch.setattr("nemo_rao.config.derived.steps_per_epoch", lambda *_: 10)

    def run(train: Train, *overrides: str) -> int:
        monkeypatch.setattr("nemo_rao.training.train.train", train)
        files = ["data.train_path=train.jsonl", "data.tokenizer=./tokenizer"]
        return main(["train", "-m", "--config-name", "gpt_dpo", *files, "model.dpo.beta=1,2,3", *overrides])

    return run


def finish(config: RunConfig) -> None:
    """What a run leaves that reached its end."""
    folder = run_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    steps = config.trainer.max_steps or 10
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": config.model.dpo.beta}) + "\n")  # type: ignore[attr-defined]
    with (folder / "started").open("a") as file:
        file.write("once\n")
    write_run(folder, start_from=None, max_steps=steps, finished_at=steps, engine=ENGINE)


def num_starts(folder: Path) -> list[int]:
    return [len(path.read_text().splitlines()) for path in sorted(folder.glob("runs/*/started"))]


def beta(config: RunConfig) -> float:
    return config.model.dpo.beta  # type: ignore[attr-defined]


def test_a_run_that_fails_is_reported_once_and_the_others_are_trained(
    run_sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig) -> None:
        if beta(config) == 1:
            raise RankFailure("rank 1 failed:\nthe reason")
        if beta(config) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(config)

    assert run_sweep(train) == 1
    assert [row["state"] for row in rows(tmp_path / "runs")] == ["failed", "failed", "finished"]
    output, message = capfd.readouterr()
    assert message.count("error:") == 2 and message.count("the reason") == 1
    assert "gpt_dpo-beta=2 was killed by SIGKILL" in message and output.count("│ failed   │") == 2

    assert run_sweep(finish) == 0, "the same command continues"
    assert [row["state"] for row in rows(tmp_path / "runs")] == ["finished"] * 3
    assert num_starts(tmp_path) == [1, 1, 1]


def test_input_that_cannot_be_used_stops_the_sweep_at_once(
    run_sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig) -> None:
        raise UserError("train.jsonl line 1: invalid JSON")

    assert run_sweep(train) == 2
    assert capfd.readouterr().err == "error: train.jsonl line 1: invalid JSON\n"
    assert not (tmp_path / "runs").exists()


def test_an_interrupt_stops_the_run_and_the_sweep(run_sweep: Callable[..., int], tmp_path: Path) -> None:
    def train(config: RunConfig) -> None:
        if beta(config) == 2:
            (tmp_path / "pid").write_text(str(os.getpid()))
            try:
                os.kill(os.getppid(), signal.SIGINT)
                time.sleep(60)
            except KeyboardInterrupt:
                (tmp_path / "stopped its ranks").touch()
                raise
        finish(config)

    started = time.monotonic()
    assert run_sweep(train) == 130
    assert time.monotonic() - started < 30
    assert (tmp_path / "stopped its ranks").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert [row["state"] for row in rows(tmp_path / "runs")] == ["finished"]


def test_a_run_is_finished_only_if_it_has_reached_the_end_that_is_asked_for(
    run_sweep: Callable[..., int], tmp_path: Path
) -> None:
    assert run_sweep(finish, "trainer.max_steps=4") == 0
    assert run_sweep(finish, "trainer.max_steps=4") == 0
    assert num_starts(tmp_path) == [1, 1, 1]
    assert run_sweep(finish, "trainer.max_steps=8") == 0, "made longer"
    assert num_starts(tmp_path) == [2, 2, 2]
    stopped = tmp_path / "runs/gpt_dpo-beta=2"
    write_run(stopped, start_from=None, max_steps=8, engine=ENGINE)  # started again, stopped before its end
    assert run_sweep(finish, "trainer.max_steps=8") == 0
    assert num_starts(tmp_path) == [2, 3, 2]


def test_runs_do_not_go_on_under_another_setting_that_the_table_would_not_tell_of(
    run_sweep: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(finish) == 0
    capfd.readouterr()
    assert run_sweep(finish, "model.optim.weight_decay=0.1") == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    for part in ("model.dpo.beta=1: ", "model.optim.weight_decay from 0.0 to 0.1", "another exp_manager.name"):
        assert part in line
    assert num_starts(tmp_path) == [1, 1, 1]
    assert run_sweep(finish, "model.optim.weight_decay=0.1", "exp_manager.resume_if_exists=false") == 0
    assert num_starts(tmp_path) == [2, 2, 2]
