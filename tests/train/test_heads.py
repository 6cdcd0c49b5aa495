"""Heads of a run's start: kept where they are the same, new where not, and each in a line of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rao.runtime.metrics_file import read_metrics

from .runs import TINY, parallel, run_training


@pytest.mark.slow
def test_a_reward_model_trained_further_keeps_its_head(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in Path(data[0].partition("=")[2]).read_text().splitlines()[:16]]
    for row in rows:
        for answer in row["responses"]:
            answer["other"] = -answer["reward"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = (f"data.{name}_path={tmp_path}/rows.jsonl" for name in ("train", "validation"))
    shared = [*TINY, *paths, data[1], f"exp_manager.exp_dir={tmp_path}", "trainer.max_epochs=null"]

    def losses(name: str, recipe: str, start_from: Path, *more: str) -> tuple[list[float], str]:
        """Validation losses, and what was said of heads."""
        capfd.readouterr()
        given = [f"exp_manager.name={name}", f"model.restore_from_path={start_from}", *more]
        run_training(recipe, [*shared, *given])
        said = [line for line in capfd.readouterr().out.splitlines() if " head: " in line]
        found = [
            record["val/loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl") if "val/loss" in record
        ]
        return found, "; ".join(said)

    first, said = losses("first", "gpt_rm", start, "trainer.max_steps=4")
    assert said == "score head: newly initialized, drawn from trainer.seed=1234 (the start has none)"
    other_seed, _ = losses("seed", "gpt_rm", start, "trainer.max_steps=1", "trainer.seed=1")
    assert abs(other_seed[0] - first[0]) > 1e-5

    # Another seed would draw another head, if one were drawn.
    again, said = losses(
        "again", "gpt_rm", tmp_path / "first", "trainer.max_steps=1", "trainer.seed=1", *parallel(1, 2, 1)
    )
    assert said == "score head: kept from the start"
    assert again[0] == pytest.approx(first[-1], rel=1e-5) and abs(first[-1] - first[0]) > 1e-3

    two = ("model.objective=rm_regression", "data.reward_field=[reward,other]", "trainer.max_steps=1")
    _, said = losses("two", "gpt_rm", tmp_path / "first", *two)
    assert said == "score head: newly initialized, drawn from trainer.seed=1234 (the start's has 1 outputs, not 2)"
    _, said = losses("policy", "gpt_rao", tmp_path / "first", "trainer.max_steps=1")
    assert said == "score head: dropped, because rao has none"
