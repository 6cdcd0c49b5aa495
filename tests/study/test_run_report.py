"""The report of one run, from the files that a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rao.checkpoint.run_records import Change, record_changes, write_run
from nemo_rao.cli import main
from nemo_rao.config.compose import compose
from nemo_rao.config.recipe_text import to_yaml


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory of a run that has been started, and has not logged anything."""
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = ["data.train_path=t.jsonl", "data.tokenizer=t", "model.rao.beta=0.25", "exp_manager.name=mine"]
    (folder / "recipe.yaml").write_text(to_yaml(compose("gpt_rao", overrides)))
    write_run(folder, start_from=None, max_steps=4, engine="nemo")
    return folder


def report(folder: Path, *options: str) -> str:
    assert main(["report", str(folder), *options]) == 0
    return (folder / "report.md").read_text()


def lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_that_has_just_been_started_has_its_settings(run: Path) -> None:
    said = report(run)
    assert "# Run mine" in said and "No step has been logged yet." in said
    assert "Objective rao, not finished of 4 planned, started from random weights (trainer.seed=1234)" in said
    assert "| model.rao.beta | 0.25 |" in said and "model.dpo.beta" not in said
    assert "## Samples" not in said and "## Changes" not in said and "## Data" not in said and "## Curves" not in said


def test_held_out_metrics_are_tabulated_or_else_those_of_training(run: Path) -> None:
    lines(run / "metrics.jsonl", {"step": 1, "lr": 0.1, "loss": 2.0}, {"step": 2, "lr": 0.1, "loss": 0.5})
    said = report(run)
    assert "| loss | 2.000 | 0.5000 | -1.500 | 2 |" in said and "| lr |" not in said and "## Curves" in said
    lines(run / "metrics.jsonl", {"step": 0, "val/loss": 3.0}, {"step": 1, "loss": 2.0})
    said = report(run)
    assert "| val/loss | 3.000 | 3.000 |  | 0 |" in said and "| loss |" not in said


def test_data_samples_and_changes_are_shown(run: Path) -> None:
    (run / "data.json").write_text(json.dumps({"training": {"num_prompts": 1234, "report": "1234 of 1235 rows kept"}}))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Second?"}]
    response = {"content": "yes | no", "reward": 0.5, "scores": {}, "tokens": 1200, "truncated": True}
    of_step_2 = {
        "step": 2,
        "prompt": turns,
        "responses": [response, response | {"advantage": -1.5, "truncated": False}],
    }
    long = {"step": 2, "prompt": "long", "responses": [response | {"content": "x" * 2500}]}
    lines(run / "samples.jsonl", {"step": 1, "prompt": "First?", "responses": [response]}, of_step_2, long)
    changes = [Change("model.optim.lr", 1e-6, 1e-7, keeps_numbers=False), Change("trainer.devices", 1, 2, True)]
    record_changes(run, changes, step=3)
    said = report(run)
    assert "| training | 1,234 | 1234 of 1235 rows kept |" in said
    assert "## Samples of step 2" in said and "First?" not in said and "system: Be brief.\nuser: Second?" in said
    assert "| 0.5000 |  | 1,200 (cut) | yes \\| no |" in said and "| 0.5000 | -1.500 | 1,200 | yes \\| no |" in said
    assert f"{'x' * 2000} … (2,500 characters)" in said and "x" * 2001 not in said
    assert "| 3 | model.optim.lr | 1e-06 | 1e-07 |" in said and "| 3 | trainer.devices | 1 | 2 |" in said


def test_what_cannot_be_reported_or_would_replace_another_file_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.html"
    other.write_text("mine")
    for arguments, said in (
        ([str(tmp_path)], f"{tmp_path}: has no recipe.yaml, so it is not a run's directory"),
        ([str(run), "--output", "report.txt"], "--output report.txt: must end in .html"),
        ([str(run), "--output", str(other)], f"--output {other}: exists and was not written by nemo-rao report"),
    ):
        assert main(["report", *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: {said}") and line.count("\n") == 1
    assert other.read_text() == "mine" and {path.name for path in run.iterdir()} == {"recipe.yaml", "run.json"}
    output = tmp_path / "there.html"
    for _ in range(2):  # it may replace its own
        report_at = main(["report", str(run), "--output", str(output)])
        assert report_at == 0 and output.with_suffix(".md").is_file()
