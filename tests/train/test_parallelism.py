"""The same loss, gradient norm and metrics however the model and the batch are split."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from .runs import NO_CHECKPOINTS, TINY, parallel, run_training, steps

LAYOUTS = {  # name: (TP, PP, DP), micro-batch size
    "one rank": ((1, 1, 1), 4),
    "one rank, small micro-batches": ((1, 1, 1), 1),
    "TP 2": ((2, 1, 1), 4),
    "PP 2": ((1, 2, 1), 2),
    "TP 2 x PP 2": ((2, 2, 1), 4),
    "TP 2 x PP 2, small micro-batches": ((2, 2, 1), 1),
    "DP 2": ((1, 1, 2), 4),
    "DP 2, small micro-batches": ((1, 1, 2), 2),
    "TP 2, sequence parallel": ((2, 1, 1), 2),
}
TOLERANCE = 1e-5
# Differences of log-probabilities: their rounding errors are those of what they are differences of.
OF_DIFFERENCES = ("rewards/", "rao/prompt_logratio")


@functools.cache
def train(recipe: str, layout: str, data: tuple[str, ...], start: Path) -> list[dict[str, float]]:
    sizes, micro_batch_size = LAYOUTS[layout]
    # A folder of its own: the reference pass, too, runs under this layout.
    folder = start.parent / f"{recipe} {layout}".replace(" ", "_").replace(",", "")
    extra = ["model.sequence_parallel=true"] if "sequence parallel" in layout else []
    overrides = [
        *TINY,
        *data,
        *NO_CHECKPOINTS,
        *parallel(*sizes),
        *extra,
        f"model.micro_batch_size={micro_batch_size}",
        "model.global_batch_size=8",
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        "trainer.max_steps=5",
    ]
    run_training(recipe, overrides)
    return steps(folder / "run")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
@pytest.mark.parametrize("recipe", ["gpt_rao", "gpt_dpo"])
def test_five_steps_are_those_of_one_rank(recipe: str, layout: str, data: tuple[str, ...], start: Path) -> None:
    expected, got = train(recipe, "one rank", data, start), train(recipe, layout, data, start)
    assert len(expected) == len(got) == 5
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        assert {"loss", "grad_norm", "logps/chosen", "rewards/margins"} <= want.keys()
        for name, value in want.items():
            if name == "rewards/accuracies" and want["step"] == 1:
                continue  # the policy is the reference: which of two equal rewards is greater is rounding
            size = abs(want["logps/chosen"]) if name.startswith(OF_DIFFERENCES) else abs(value)
            assert have[name] == pytest.approx(value, rel=0, abs=TOLERANCE * size + 1e-12), (want["step"], name)


@pytest.mark.parametrize("recipe", ["gpt_rao", "gpt_dpo"])
def test_five_steps_change_the_loss(recipe: str, data: tuple[str, ...], start: Path) -> None:
    losses = [step["loss"] for step in train(recipe, "one rank", data, start)]
    assert max(losses) > 1.01 * min(losses)
