"""Trained runs as scorers: the scores in the file are those that validation saw."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from nemo_rao.integration.metrics_file import read_metrics

from .runs import TINY, in_fork, parallel, run_training


def score(*arguments: str) -> None:
    in_fork(_score, arguments)


def _score(arguments: tuple[str, ...]) -> None:
    from nemo_rao.cli import main

    assert main(["score", *arguments]) == 0


@pytest.mark.parametrize(
    ("objective", "layout"), [("rm", parallel(2, 1, 1)), ("dpo", parallel(1, 2, 1))], ids=["reward model", "policy"]
)
def test_the_margins_of_the_scored_file_are_those_of_validation(
    objective: str, layout: tuple[str, ...], data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    held_out, scored = tmp_path / "held_out.jsonl", tmp_path / "scored.jsonl"
    with Path(data[0].partition("=")[2]).open() as rows:
        held_out.write_text("".join(itertools.islice(rows, 12)))
    run = tmp_path / objective
    run_training(
        "gpt_rao",
        [
            *TINY,
            *data,
            *layout,
            f"model.objective={objective}",
            f"data.validation_path={held_out}",
            f"model.restore_from_path={start}",
            f"exp_manager.exp_dir={tmp_path}",
            f"exp_manager.name={objective}",
            "trainer.max_steps=4",
        ],
    )
    expected = [record for record in read_metrics(run / "metrics.jsonl") if "val/loss" in record][-1]
    score(str(held_out), str(scored), "--scorer", f"r_1=model:{run}")

    before = [json.loads(line) for line in held_out.read_text().splitlines()]
    after = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [row["prompt"] for row in after] == [row["prompt"] for row in before]
    margins = []
    for old, new in zip(before, after, strict=True):
        given = [answer["reward"] for answer in old["responses"]]
        found = [answer["r_1"] for answer in new["responses"]]
        assert found == [answer["reward"] for answer in new["responses"]]
        margins.append(found[given.index(max(given))] - found[given.index(min(given))])
    assert sum(margins) / len(margins) == pytest.approx(expected["val/rewards/margins"], rel=1e-4, abs=1e-6)
    assert expected["val/rewards/margins"] != 0


def test_a_run_that_cannot_score_is_refused(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    from nemo_rao.errors import UserError
    from nemo_rao.integration.score_model import model_kind
    from nemo_rao.scoring.scorer import Place

    path = data[0].partition("=")[2]
    for run, complaint in ((tmp_path, "no recipe.yaml"), (start, "objective sft has no implicit reward")):
        with pytest.raises(UserError, match=complaint):
            model_kind(path).make(str(run), Place(tmp_path))
