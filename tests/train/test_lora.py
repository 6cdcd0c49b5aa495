"""Adapters in bf16 and under recomputation, which depend on how the model is wrapped and what needs a gradient."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from .runs import NO_CHECKPOINTS, TINY, parallel, run_training, steps

LORA = ("model.peft.scheme=lora", "model.peft.lora.dim=4", "trainer.max_steps=3", *NO_CHECKPOINTS)


def test_recomputed_layers_train_their_adapters(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    found = []
    for name, extra in (("kept", ()), ("again", ("model.recompute_granularity=full", *parallel(1, 2, 1)))):
        given = [*TINY, *data, *LORA, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
        run_training("gpt_dpo", [*given, f"exp_manager.name={name}", *extra])
        found.append(steps(tmp_path / name))
    for kept, again in zip(*found, strict=True):
        assert kept["grad_norm"] > 0
        assert again["loss"] == pytest.approx(kept["loss"], rel=1e-5)
        assert again["grad_norm"] == pytest.approx(kept["grad_norm"], rel=1e-5)


def test_a_run_in_bf16_starts_at_its_reference(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    given = [*TINY, *data, *LORA, f"model.restore_from_path={start}", f"exp_manager.exp_dir={tmp_path}"]
    run_training("gpt_dpo", [*given, "exp_manager.name=run", "precision=bf16_mixed", *parallel(1, 2, 1)])
    first, *_, last = steps(tmp_path / "run")
    # Not bit for bit: batches are drawn anew, and products in bf16 round by the shapes that padding gives them.
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["grad_norm"] > 0
    assert last["loss"] != first["loss"]
