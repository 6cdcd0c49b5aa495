"""Trained runs as scorers: the scores in the file are those that validation saw."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_rao.runtime.metrics_file import read_metrics

from .runs import NO_CHECKPOINTS, TINY, in_fork, parallel, run_training, score


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


def fails(folder: Path, *arguments: str) -> str:
    """``nemo-rao score`` with these arguments, in a process of its own; returns the line with which it fails."""
    in_fork(_fail, folder / "said", arguments)
    said = (folder / "said").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def _fail(said: Path, arguments: Sequence[str]) -> None:
    from nemo_rao.cli import main

    with said.open("w") as file, contextlib.redirect_stderr(file):
        assert main(["score", *arguments]) in (1, 2)


def test_a_file_with_responses_too_long_for_the_model_is_scored_and_trains(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """One response of a prompt that is too long costs its prompt's others nothing, and RAO drops that prompt.

    The limit is named, can be raised up to the model's context, and stops the command where too many are beyond it.
    """
    with Path(data[0].partition("=")[2]).open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 9)]
    answers = rows[4]["responses"]
    answers.insert(1, {"content": "many words " * 60, "reward": 0.5})
    given, scored = tmp_path / "given.jsonl", tmp_path / "scored.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = [*TINY, *NO_CHECKPOINTS, data[1], f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
    tokenizer = shutil.copytree(data[1].partition("=")[2], tmp_path / "tokenizer")
    (tokenizer / "config.json").write_text(json.dumps({"hidden_size": 48, "max_position_embeddings": 1000}))
    rm = [
        *TINY,
        data[0],
        f"data.tokenizer={tokenizer}",
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={tmp_path}",
    ]
    run_training("gpt_rm", [*rm, "exp_manager.name=rm", "trainer.max_steps=1"])
    scorer = f"model:{tmp_path / 'rm'}"
    too_many = fails(tmp_path, str(given), str(scored), "--scorer", scorer, "--max-missing", "0.02")
    assert f"model.seq_length=64, with which {tmp_path / 'rm'} was trained (--max-length raises it)" in too_many
    assert "given.jsonl line 5, response 2" in too_many and not list(tmp_path.glob("model_scores/*"))
    beyond = fails(tmp_path, str(given), str(scored), "--scorer", scorer, "--max-length", "1001")
    assert f"--max-length 1001: the context of {tmp_path / 'rm'}'s model is 1000 tokens. Lower it" in beyond
    score(str(given), str(tmp_path / "long.jsonl"), "--scorer", scorer, "--max-length", "1000")
    scored_lines = (tmp_path / "long.jsonl").read_text().splitlines()
    longer = [[answer["reward"] for answer in json.loads(line)["responses"]] for line in scored_lines]
    score(str(given), str(scored), "--scorer", scorer)

    found = [[answer["reward"] for answer in json.loads(line)["responses"]] for line in scored.open()]
    assert [[value is None for value in row] for row in found] == [
        [(number, at) == (4, 1) for at in range(len(row["responses"]))] for number, row in enumerate(rows)
    ]
    assert longer[4][1] is not None
    for there, row in zip(longer, found, strict=True):
        both = [(one, other) for one, other in zip(there, row, strict=True) if other is not None]
        assert [one for one, _ in both] == pytest.approx([other for _, other in both], rel=1e-5, abs=1e-6)
    alone = tmp_path / "alone.jsonl"  # without the long one the others have the same scores
    del answers[1]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(str(given), str(alone), "--scorer", f"model:{tmp_path / 'rm'}")
    del found[4][1]
    assert [[answer["reward"] for answer in json.loads(line)["responses"]] for line in alone.open()] == [
        pytest.approx(row, rel=1e-5, abs=1e-6) for row in found
    ]
    # The same weights in another network have scores of their own, not those that are cached.
    recipe, other = tmp_path / "rm" / "recipe.yaml", tmp_path / "other.jsonl"
    text = recipe.read_text()
    assert "rotary_base: null" in text
    recipe.write_text(text.replace("rotary_base: null", "rotary_base: 10"))
    score(str(given), str(other), "--scorer", f"model:{tmp_path / 'rm'}")
    recipe.write_text(text)
    assert other.read_text() != alone.read_text()
    run_training("gpt_rao", [*shared, f"data.train_path={scored}", "exp_manager.name=rao", "trainer.max_steps=2"])
    assert len([r for r in read_metrics(tmp_path / "rao" / "metrics.jsonl") if "loss" in r]) == 2


def test_a_trained_model_is_asked_before_what_computes_in_this_process(
    data: tuple[str, ...], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks are forks, in which threads that torch has started here would be missing."""
    rm = ["exp_manager.name=rm", f"exp_manager.exp_dir={tmp_path}", f"model.restore_from_path={start}"]
    run_training("gpt_rm", [*TINY, *data, *rm, "trainer.max_steps=1"])
    (tmp_path / "asks.py").write_text(
        "import pathlib\n"
        "def whether_the_model_has_been(prompt, response):\n"
        f"    return float(any(pathlib.Path({str(tmp_path)!r}, 'model_scores').glob('*/sums.npy')))\n"
    )
    given, scored = data[0].partition("=")[2], tmp_path / "scored.jsonl"
    monkeypatch.chdir(tmp_path)
    rule = "r_1=rule:asks:whether_the_model_has_been"
    score(given, str(scored), "--scorer", rule, "--scorer", f"r_2=model:{tmp_path / 'rm'}")
    rows = [json.loads(line)["responses"] for line in scored.open()]
    for row in rows:
        assert all([name for name in answer if name.startswith("r_")] == ["r_1", "r_2"] for answer in row)
    assert {answer["r_1"] for row in rows for answer in row} == {1.0}


def test_a_run_that_cannot_score_is_refused(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    from nemo_rao.errors import UserError
    from nemo_rao.scoring.run import Job
    from nemo_rao.scoring.scorer import OutputDirectory
    from nemo_rao.training.score_model import model_kind

    job = Job(data[0].partition("=")[2], tmp_path / "out.jsonl", [])
    for run, complaint in ((tmp_path, "no recipe.yaml"), (start, "objective sft has no implicit reward")):
        with pytest.raises(UserError, match=complaint):
            model_kind(job).make(str(run), OutputDirectory(tmp_path))
