"""Whole runs in simulated FP8 and in fp16: they start at the reference, learn, and resume as if never interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from .runs import NO_CHECKPOINTS, TINY, in_fork, parallel, run_training, steps
from .test_resume import overrides, train_and_die

SIMULATED = ("precision.fp8_simulation=true", "precision.first_last_layers_bf16=false")
SIZES = ("model.arch.hidden_size=64", "model.arch.ffn_hidden_size=128")  # 16 and 32 times whole numbers on two ranks
RECIPES = ["fp8_delayed", "fp8_delayed_e4m3", "fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8"]
pytestmark = pytest.mark.slow
STEPS = 12  # eight are an epoch: in the data's order, the last four see the first four's prompts again


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    """Two fine-tuning steps in bf16, in sizes that 8 bits take."""
    folder = tmp_path_factory.mktemp("start")
    given = [*TINY, *SIZES, *data, "precision=bf16_mixed", f"exp_manager.exp_dir={folder}", "exp_manager.name=sft"]
    run_training("gpt_sft", [*given, "trainer.max_steps=2"])
    return folder / "sft"


def given(folder: Path, data: Sequence[str], start: Path, *extra: str) -> list[str]:
    common = [*TINY, *SIZES, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={folder}"]
    return [*common, "exp_manager.name=run", f"trainer.max_steps={STEPS}", *extra]


def of_reference(step: dict[str, float]) -> dict[str, float]:
    """What is 0 where the policy is the reference."""
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rao/prompt_logratio")
    return {name: step[name] for name in names}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Without --every-combination, one recipe with a history and one with blocks of its own, and one resume."""
    every = metafunc.config.getoption("every_combination")
    starts = {
        f"{name}, TP 2": (name, parallel(2, 1, 1)) for name in (RECIPES if every else ("fp8_delayed", "fp8_mxfp8"))
    }
    resumes = {"delayed, PP 2": ("fp8_delayed", parallel(1, 2, 1))}
    if every:
        starts["fp8_delayed, TP 1"] = ("fp8_delayed", parallel(1, 1, 1))
        resumes |= {"delayed, TP 2 x PP 2": ("fp8_delayed", parallel(2, 2, 1))}
        resumes |= {"delayed, DP 2": ("fp8_delayed", parallel(1, 1, 2))}
        resumes |= {"tensorwise, TP 2": ("fp8_tensorwise", parallel(2, 1, 1))}
    if "ranks" in metafunc.fixturenames:
        cases = resumes if "killed" in metafunc.function.__name__ else starts
        metafunc.parametrize(("precision", "ranks"), cases.values(), ids=list(cases))


def test_every_recipe_starts_at_the_reference_and_learns(
    precision: str, ranks: Sequence[str], data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """In the data's order the reference pass cuts the same micro-batches: rho is 0, not nearly 0."""
    layout = ("data.shuffle=false", *ranks, *(("model.sequence_parallel=true",) if "=2" in ranks[0] else ()))
    run_training(
        "gpt_rao", given(tmp_path, data, start, f"precision={precision}", *SIMULATED, *layout, *NO_CHECKPOINTS)
    )
    got = steps(tmp_path / "run")
    assert of_reference(got[0]) == dict.fromkeys(of_reference(got[0]), 0)
    assert got[0]["rewards/accuracies"] == 0
    assert any(of_reference(got[1]).values()), "the policy has moved"
    losses = [step["loss"] for step in got]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


def test_without_calibration_a_run_in_delayed_scaling_would_not_start_at_the_reference(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """A history of one micro-batch forgets what it was calibrated on within the first step."""
    forgetful = ("precision.fp8_amax_history_len=1", "precision.fp8_amax_compute_algo=most_recent")
    extra = ("precision=fp8_delayed", *SIMULATED, *forgetful, "data.shuffle=false", "trainer.max_steps=1")
    run_training("gpt_rao", given(tmp_path, data, start, *extra, *NO_CHECKPOINTS))
    assert any(of_reference(steps(tmp_path / "run")[0]).values())


def test_a_run_killed_within_a_step_continues_bitwise(
    precision: str, ranks: Sequence[str], data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    extra = (*SIZES, *ranks, f"precision={precision}", *SIMULATED, "precision.fp8_amax_history_len=9")
    run_training("gpt_rao", overrides(tmp_path / "undisturbed", data, start, *extra))
    killed = overrides(tmp_path / "killed", data, start, *extra)
    with pytest.raises(AssertionError, match="rank 0 was killed by SIGKILL"):
        in_fork(train_and_die, "gpt_rao", killed)
    run_training("gpt_rao", killed)
    assert steps(tmp_path / "killed" / "run") == steps(tmp_path / "undisturbed" / "run")


def test_how_often_a_run_is_validated_changes_nothing(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    validation = data[0].replace("data.train_path", "data.validation_path")
    for every in (1, 5):
        extra = ("precision=fp8_delayed", *SIMULATED, "trainer.max_steps=5", f"trainer.val_check_interval={every}")
        run_training("gpt_rao", given(tmp_path / str(every), data, start, validation, *extra, *NO_CHECKPOINTS))
    often, seldom = (steps(tmp_path / str(every) / "run") for every in (1, 5))
    assert often == seldom
    records = [json.loads(line) for line in (tmp_path / "1" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val/loss" in record for record in records) == 6


def test_fp16_learns_what_bf16_learns(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """Gradients have bf16's size: what the loss is multiplied by is divided out."""
    in_order = ("data.shuffle=false", *NO_CHECKPOINTS)
    for precision in ("fp16_mixed", "bf16_mixed"):
        run_training("gpt_rao", given(tmp_path / precision, data, start, f"precision={precision}", *in_order))
    fp16, bf16 = (steps(tmp_path / precision / "run") for precision in ("fp16_mixed", "bf16_mixed"))
    for one, other in zip(fp16, bf16, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    losses = [step["loss"] for step in fp16]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


def test_fp16_leaves_out_steps_that_overflow_until_the_scale_fits_and_resumes_with_it(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    scaled = ("precision=fp16_mixed", "precision.fp16_initial_loss_scale=1e6", "precision.fp16_hysteresis=1")
    save = ("exp_manager.checkpoint_callback_params.every_n_train_steps=3",)
    run_training("gpt_rao", given(tmp_path / "whole", data, start, *scaled, *save))
    whole = steps(tmp_path / "whole" / "run")
    left_out = [step["step"] for step in whole if "grad_norm" not in step]
    # One step's rows may fit into a scale that the next one's do not.
    assert left_out and left_out[0] == 1 and left_out[-1] < STEPS / 2
    run_training("gpt_rao", given(tmp_path / "parts", data, start, *scaled, *save, "trainer.max_steps=6"))
    run_training("gpt_rao", given(tmp_path / "parts", data, start, *scaled, *save))
    assert steps(tmp_path / "parts" / "run") == whole
