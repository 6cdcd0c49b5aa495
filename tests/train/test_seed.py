"""``trainer.seed`` decides the initial weights."""

from __future__ import annotations

from pathlib import Path

from .runs import NO_CHECKPOINTS, TINY, run_training, steps


def test_random_weights_are_those_of_the_seed(data: tuple[str, ...], tmp_path: Path) -> None:
    def first_loss(name: str, *overrides: str) -> float:
        given = [*TINY, *data, *NO_CHECKPOINTS, "trainer.max_steps=1", f"exp_manager.exp_dir={tmp_path}"]
        run_training("gpt_sft", [*given, f"exp_manager.name={name}", *overrides])
        return steps(tmp_path / name)[0]["loss"]

    one = first_loss("one", "trainer.seed=1")
    assert first_loss("again", "trainer.seed=1") == one
    assert abs(first_loss("other", "trainer.seed=2") - one) > 1e-3
