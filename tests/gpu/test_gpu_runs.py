"""Whole runs on a GPU: the numbers of a CPU's, in bf16 and in FP8; resumed, moved between devices, with adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config.gpu_models import FP8_RECIPES

from ..train.runs import NO_CHECKPOINTS, _train, die_after_step, in_fork, last_stored, steps
from .conftest import COMPARED, STEPS
from .on_device import DEVICE, NO_TE, ON_GPU, WITH_TE, RunsOnTheCpu, result_of, synchronizations, train

pytestmark = pytest.mark.gpu

BF16 = (*DEVICE, "precision=bf16_mixed")
FIRST_STEP = "log-ratios to the reference are 0 up to rounding"
ALL_CHECKPOINTS = (
    "exp_manager.checkpoint_callback_params.every_n_train_steps=3",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
)


def named(folder: Path, name: str, start: Path, *more: str) -> tuple[str, ...]:
    return (f"exp_manager.exp_dir={folder}", f"exp_manager.name={name}", f"model.restore_from_path={start}", *more)


def assert_close(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]], *, relative: float) -> None:
    """Losses and gradient norms of the same steps. What is near 0 is compared with the largest of its kind."""
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for name in ("loss", "grad_norm"):
        largest = max(abs(one[name]) for one in expected)
        for one, other in zip(found, expected, strict=True):
            assert one[name] == pytest.approx(other[name], abs=relative * largest), (name, one["step"])


@pytest.mark.parametrize("recipe", COMPARED)
def test_five_steps_in_bf16_are_those_of_fp32_on_a_cpu(
    recipe: str, data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], tmp_path: Path
) -> None:
    given = named(tmp_path, "run", start, *NO_CHECKPOINTS, f"trainer.max_steps={STEPS}")
    said = train(recipe, [*data, *BF16, *given])
    assert FIRST_STEP in said
    assert_close(steps(tmp_path / "run"), steps(on_cpu[recipe]), relative=0.05)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("perf/tflops_per_gpu" in record) == ON_GPU


@pytest.mark.parametrize("recipe", [name for name, one in FP8_RECIPES.items() if one.runs_on((9, 0))])
def test_fp8_begins_with_the_reference_and_follows_fp32(
    recipe: str, data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], tmp_path: Path
) -> None:
    simulated = () if WITH_TE else ("precision.fp8_simulation=true",)
    given = named(tmp_path, "run", start, *NO_CHECKPOINTS, "trainer.max_steps=2")
    said = train("gpt_rao", [*data, *DEVICE, f"precision=fp8_{recipe}", *simulated, *given])
    assert FIRST_STEP in said
    assert_close(steps(tmp_path / "run"), steps(on_cpu["gpt_rao"])[:2], relative=0.2)


def test_packed_rows_take_the_steps_of_rows(
    data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], tmp_path: Path
) -> None:
    given = named(tmp_path, "run", start, *NO_CHECKPOINTS, "data.packing=true", "trainer.max_steps=2")
    assert FIRST_STEP in train("gpt_rao", [*data, *BF16, *given])
    assert_close(steps(tmp_path / "run"), steps(on_cpu["gpt_rao"])[:2], relative=0.05)


def train_and_die(recipe: str, given: Sequence[str]) -> None:
    die_after_step(4)
    _train(recipe, given)


def test_a_killed_run_continues(data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], tmp_path: Path) -> None:
    """Killed in its fifth step. Then its last checkpoint is written in the background, and two steps are profiled."""
    keep = (*ALL_CHECKPOINTS, f"trainer.max_steps={STEPS}")
    given = [*data, *BF16, *named(tmp_path, "run", start, *keep)]
    with pytest.raises(AssertionError, match="SIGKILL"):
        in_fork(train_and_die, "gpt_rao", given)
    beside = ("exp_manager.checkpoint_callback_params.async_save=true", "trainer.profile_steps=[4,5]")
    said = train("gpt_rao", [*given, *beside])
    assert ", step 3 of 5" in said
    assert_close(steps(tmp_path / "run"), steps(on_cpu["gpt_rao"]), relative=0.05)
    weights = last_stored(tmp_path / "run")
    assert any(name.endswith("linear_fc2.weight") for name in weights)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values() if tensor.is_floating_point())
    profile = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert profile == {"trace_steps_4_to_5.json.gz", *(["memory_steps_4_to_5.pickle"] if ON_GPU else [])}


def test_a_checkpoint_of_a_cpu_continues_on_a_gpu_and_back(
    data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], cpu: RunsOnTheCpu, tmp_path: Path
) -> None:
    """Three steps on the CPU, two on the device, one more on the CPU, all in fp32."""
    shutil.copytree(on_cpu["gpt_rao"], tmp_path / "run", symlinks=True)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name != "step=3":
            path.unlink() if path.is_symlink() else shutil.rmtree(path)
    reference = f"reference.cache_dir={on_cpu['gpt_rao'].parent}/reference"
    common = [*data, *named(tmp_path, "run", start, *ALL_CHECKPOINTS, reference)]
    said = train("gpt_rao", [*common, *DEVICE, "precision=fp32", f"trainer.max_steps={STEPS}"])
    assert "step=3, step 3 of 5" in said
    assert_close(steps(tmp_path / "run"), steps(on_cpu["gpt_rao"]), relative=0.01)
    cpu.start("gpt_rao", [*common, f"trainer.max_steps={STEPS + 1}"])()
    assert [one["step"] for one in steps(tmp_path / "run")] == list(range(1, STEPS + 2))


def test_adapters_begin_without_effect_and_learn(data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    lora = ("model.peft.scheme=lora", "model.peft.lora.dim=8", "model.optim.lr=1e-3", "data.shuffle=false")
    once = ("trainer.max_steps=6", "data.num_prompts=8")  # the same batch in each step
    said = train(
        "gpt_rao",
        [*data, *BF16, *named(tmp_path, "run", start, *NO_CHECKPOINTS, *lora, *once, "trainer.max_epochs=null")],
    )
    assert FIRST_STEP in said
    losses = [one["loss"] for one in steps(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(not WITH_TE, reason=NO_TE)
@pytest.mark.parametrize("key", ["model.cpu_offloading_num_layers=1", "model.optim.cpu_offload_fraction=1"])
def test_what_waits_in_host_memory_changes_no_number(
    key: str, data: tuple[str, ...], start: Path, on_cpu: dict[str, Path], tmp_path: Path
) -> None:
    given = named(tmp_path, "run", start, *NO_CHECKPOINTS, key, f"trainer.max_steps={STEPS}")
    train("gpt_rao", [*data, *BF16, *given])
    assert_close(steps(tmp_path / "run"), steps(on_cpu["gpt_rao"]), relative=0.05)


# ------------------------------------------------------------------------------------------- waits of the host


def _waits(recipe: str, overrides: Sequence[str], step: int) -> list[str]:
    """Where the host waits for the device in a step."""
    from nemo_rao.loop.session import Hook

    found: list[str] = []

    class Count(Hook):
        def before_step(self, session: Any) -> None:
            if session.step == step:
                self.counting = synchronizations()
                self.found = self.counting.__enter__()

        def after_step(self, session: Any) -> None:
            if session.step == step + 1:
                self.counting.__exit__(None, None, None)
                found.extend(self.found)

    _train(recipe, overrides, hooks=lambda hooks: [Count(), *hooks])
    return found


@pytest.mark.parametrize("layout", ["data.packing=false", "data.packing=true"])
def test_no_micro_batch_makes_the_host_wait(layout: str, data: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    """The host waits equally often in steps of two and of four micro-batches."""
    found = {}
    for size in (4, 2):
        given = named(tmp_path, str(size), start, *NO_CHECKPOINTS, layout, "trainer.max_steps=3")
        found[size] = result_of(_waits, "gpt_rao", [*data, *BF16, *given, f"model.micro_batch_size={size}"], 1)
    assert found[4], "numbers of the step are read once"
    more = [line for line in found[2] if found[2].count(line) > found[4].count(line)]
    if not ON_GPU:  # tables of segments are read by PyTorch's attention alone, not by Transformer Engine's
        more = [line for line in more if "nemo_rao/mcore/attention.py" not in line]
    assert sorted(set(more)) == []
