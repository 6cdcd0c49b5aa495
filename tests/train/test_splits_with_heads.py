"""What objectives add to a run: a head, with a learning rate of its own or not, a statistic of the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import FOUR_LAYERS, NO_CHECKPOINTS, parallel, run_training, steps

LAYOUTS = {  # name: (TP, PP, DP x CP), micro-batch size, more
    "DP 2, small micro-batches": (parallel(1, 1, 2), 1, ()),
    "TP 2, sequence parallel": (parallel(2, 1, 1), 4, ("model.sequence_parallel=true",)),
    "CP 2": (parallel(1, 1, 2), 2, ("model.context_parallel_size=2",)),
    "PP 2, interleaved": (parallel(1, 2, 1), 4, ("model.virtual_pipeline_model_parallel_size=2",)),
}
OBJECTIVES = {"dro": ("model.dro.value_lr=0.01",), "kto": ("model.kto.threshold=0.6",), "rm": ()}


def train(objective: str, data: tuple[str, ...], deep_start: Path, folder: Path, *extra: str) -> list[dict[str, float]]:
    overrides = [
        *FOUR_LAYERS,
        *data,
        *NO_CHECKPOINTS,
        f"model.objective={objective}",
        *OBJECTIVES.get(objective, ()),
        "model.global_batch_size=8",
        "model.micro_batch_size=8",
        f"model.restore_from_path={deep_start}",
        f"exp_manager.exp_dir={folder.parent}",
        f"exp_manager.name={folder.name}",
        "trainer.max_steps=4",
        *extra,
    ]
    run_training("gpt_rao", overrides)
    return steps(folder)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_split_of_the_global_batch_gives_the_same_steps(
    objective: str, data: tuple[str, ...], deep_start: Path, tmp_path: Path
) -> None:
    whole = train(objective, data, deep_start, tmp_path / "whole")
    if objective == "kto":
        assert any(step["kto/z0"] > 0 for step in whole), "or the statistic would not be seen"
    for number, (ranks, micro_batch_size, more) in enumerate(LAYOUTS.values()):
        size = f"model.micro_batch_size={micro_batch_size}"
        split = train(objective, data, deep_start, tmp_path / f"split{number}", *ranks, size, *more)
        for want, have in zip(whole, split, strict=True):
            for name, value in want.items():
                if name == "rewards/accuracies":
                    continue  # which of two nearly equal rewards is greater is rounding
                assert have[name] == pytest.approx(value, rel=1e-4, abs=2e-5), (number, want["step"], name)


def test_the_value_head_learns_at_its_own_rate_and_shares_the_policys_reference(
    data: tuple[str, ...], deep_start: Path, tmp_path: Path
) -> None:
    frozen = "model.optim.lr=1e-30"
    apart = train("dro", data, deep_start, tmp_path / "apart", frozen, "model.dro.value_lr=0.01")
    together = train("dro", data, deep_start, tmp_path / "together", frozen, "model.dro.value_lr=null")
    train("rao", data, deep_start, tmp_path / "rao", frozen)
    assert all(abs(step["dro/value"]) < 1e-20 for step in together)
    values = [step["dro/value"] for step in apart]
    assert values[0] == 0 and values[-1] > 0.05, "the mean reward is above 0"
    assert [step["logps/chosen"] for step in apart] == [step["logps/chosen"] for step in together]
    assert [step["lr"] for step in apart] == pytest.approx([1e-30] * 4)
    assert len(list((tmp_path / "reference").iterdir())) == 1, "a new head makes no new policy"
