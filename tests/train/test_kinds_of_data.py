"""Objectives on the kinds of data that only some of them take: unpaired, several reward models, every pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .runs import NO_CHECKPOINTS, TINY, run_training, steps


def rewritten(data: tuple[str, ...], path: Path, change: Callable[[dict], list[dict[str, Any]]]) -> tuple[str, str]:
    rows = map(json.loads, Path(data[0].partition("=")[2]).read_text().splitlines())
    path.write_text("".join(json.dumps(new) + "\n" for row in rows for new in change(row)))
    return f"data.train_path={path}", data[1]


def train(objective: str, data: tuple[str, ...], start: Path, folder: Path, *extra: str) -> list[dict[str, float]]:
    overrides = [
        *TINY,
        *data,
        *NO_CHECKPOINTS,
        f"model.objective={objective}",
        "model.global_batch_size=8",
        "model.micro_batch_size=4",
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        "trainer.max_steps=2",
        *extra,
    ]
    run_training("gpt_rao", overrides)
    return steps(folder / "run")


def test_kto_learns_from_unpaired_completions_with_labels(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    def unpaired(row: dict) -> list[dict[str, Any]]:
        answers = [row["responses"][0], row["responses"][-1]]
        return [
            {"prompt": row["prompt"], "completion": answer["content"], "label": answer["reward"] > 0.5}
            for answer in answers
        ]

    got = train("kto", rewritten(data, tmp_path / "unpaired.jsonl", unpaired), start, tmp_path)
    first = got[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5), "1 - s(0) at the reference"
    assert {"kto/reward_desirable", "kto/reward_undesirable"} <= first.keys()


def test_fine_tuning_learns_every_answer_of_a_conversation(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    def chat(first: int, second: int | None) -> Callable[[dict], list[dict[str, Any]]]:
        def change(row: dict) -> list[dict[str, Any]]:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["responses"][first]["content"]},
            ]
            if second is not None:
                messages += [messages[0], {"role": "assistant", "content": row["responses"][second]["content"]}]
            return [{"messages": messages}]

        return change

    long = ("model.seq_length=160", "model.global_batch_size=64", "model.micro_batch_size=16", "trainer.max_steps=3")
    made = rewritten(data, tmp_path / "chats.jsonl", chat(0, 1))
    course = train("sft", made, start, tmp_path / "chats", *long)
    assert course[-1]["loss"] < course[0]["loss"]
    single = rewritten(data, tmp_path / "single.jsonl", chat(0, None))
    first = train("sft", single, start, tmp_path / "single", *long)[0]["loss"]
    assert course[0]["loss"] != pytest.approx(first, rel=1e-5), "the second answer counts"


def test_robust_po_takes_the_nearest_of_several_reward_models(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """At the reference Delta = 0: the loss is the square of the smallest difference that a model sees."""

    def two_models(row: dict) -> list[dict[str, Any]]:
        best, worst = (pick(row["responses"], key=lambda answer: answer["reward"]) for pick in (max, min))
        return [
            {
                "prompt": row["prompt"],
                "responses": [
                    {"content": best["content"], "a": 3.0, "b": 1.0},
                    {"content": worst["content"], "a": 0.0, "b": 0.5},
                ],
            }
        ]

    made = rewritten(data, tmp_path / "models.jsonl", two_models)
    got = train("robust_po", made, start, tmp_path, "data.reward_field=[a,b]")
    assert got[0]["loss"] == pytest.approx(0.5**2, rel=1e-4)
    assert got[0]["data/reward_chosen"] == pytest.approx(2.0), "the mean of the two"


def test_a_pairwise_loss_takes_every_pair_if_configured_to(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """The same first loss, log 2, from other pairs: the next ones differ."""
    courses = {
        choice: train("dpo", data, start, tmp_path / choice, f"data.responses={choice}")
        for choice in ("all", "best_worst", "best_random")
    }
    assert {round(course[0]["loss"], 5) for course in courses.values()} == {0.69315}
    assert len({course[1]["loss"] for course in courses.values()}) == 3
    assert len({course[0]["grad_norm"] for course in courses.values()}) == 3
