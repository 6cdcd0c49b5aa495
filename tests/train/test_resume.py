"""A run that was killed goes on as if it had not been: the same numbers, bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ..slow import slow_but
from .runs import (
    TINY,
    _train,
    die_after_step,
    in_fork,
    last_stored,
    parallel,
    run_training,
    same,
    start_fork,
    steps,
    stored,
)

NUM_STEPS, EVERY = 7, 3
INTERLEAVED = (
    "model.virtual_pipeline_model_parallel_size=2",
    "model.arch.num_layers=4",
    "model.restore_from_path=null",
)


def overrides(folder: Path, data: Sequence[str], start: Path, *extra: str) -> list[str]:
    return [
        *TINY,
        *data,
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        f"trainer.max_steps={NUM_STEPS}",
        f"exp_manager.checkpoint_callback_params.every_n_train_steps={EVERY}",
        "model.arch.hidden_dropout=0.1",  # so that the random numbers count too
        "model.optim.sched.name=cosine",
        *extra,
    ]


def train_and_die(recipe: str, given: Sequence[str]) -> None:
    die_after_step(NUM_STEPS - 2)
    _train(recipe, given)


@pytest.mark.parametrize(
    ("recipe", "ranks", "extra"),
    [
        pytest.param("gpt_rao", parallel(2, 2, 1), (), marks=pytest.mark.slow),
        pytest.param("gpt_dpo", parallel(1, 2, 1), ("model.peft.scheme=lora",), marks=pytest.mark.slow),
        ("gpt_rao", parallel(1, 2, 1), ("model.objective=dro", "model.dro.value_lr=0.01")),
        pytest.param(
            "gpt_rao", parallel(1, 1, 2), ("model.objective=kto", "model.kto.threshold=0.6"), marks=pytest.mark.slow
        ),
        pytest.param("gpt_rao", parallel(1, 2, 1), INTERLEAVED, marks=pytest.mark.slow),
    ],
    ids=[
        "RAO, TP 2 x PP 2",
        "DPO with LoRA, PP 2",
        "DRO and its value head, PP 2",
        "KTO and its statistic of all ranks, DP 2",
        "RAO, interleaved PP 2",
    ],
)
def test_a_run_killed_within_a_step_continues_bitwise(
    recipe: str, ranks: Sequence[str], extra: Sequence[str], data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    undisturbed = overrides(tmp_path / "undisturbed", data, start, *ranks, *extra)
    run_training(recipe, undisturbed)
    expected = steps(tmp_path / "undisturbed" / "run")
    assert [step["step"] for step in expected] == list(range(1, NUM_STEPS + 1))

    given = overrides(tmp_path / "killed", data, start, *ranks, *extra)
    with pytest.raises(AssertionError, match="rank 0 was killed by SIGKILL"):
        in_fork(train_and_die, recipe, given)
    before = steps(tmp_path / "killed" / "run")
    assert [step["step"] for step in before] == [1, 2, 3, 4, 5], "it died in the sixth step"
    run_training(recipe, given)
    assert steps(tmp_path / "killed" / "run") == expected
    assert same(last_stored(tmp_path / "killed" / "run"), last_stored(tmp_path / "undisturbed" / "run"))


def test_a_killed_launcher_takes_its_ranks_along_and_the_same_command_continues(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    given = overrides(tmp_path, data, start, *parallel(2, 1, 1), "trainer.max_steps=40")
    process, _ = start_fork(_train, "gpt_rao", given)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(steps(tmp_path / "run")) < EVERY + 2:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.05)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{rank}").exists() and not _is_zombie(rank) for rank in ranks):
        assert time.monotonic() < deadline, "ranks outlive the process that started them"
        time.sleep(0.05)
    run_training("gpt_rao", [*given, "trainer.max_steps=8"])
    resumed = steps(tmp_path / "run")
    assert [step["step"] for step in resumed] == sorted({step["step"] for step in resumed}), "no step is logged twice"


def test_an_unfinished_checkpoint_is_never_resumed_from(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of step 6 is as a kill leaves it: the run continues from step 3, and writes step 6 anew."""
    from nemo_rao.checkpoint.find import last_checkpoint

    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    given = overrides(tmp_path, data, start, "trainer.max_steps=6", keep)
    run_training("gpt_sft", given)
    whole, folder = steps(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    newest = last_checkpoint(tmp_path / "run")
    assert newest is not None and newest.name.startswith("step=6")
    expected = stored(newest)
    for checkpoint in folder.glob("step=6*"):
        checkpoint.with_name(checkpoint.name + "-unfinished").touch()
        (checkpoint / "weights" / ".metadata").unlink(missing_ok=True)  # step=6-last may be a link
    capfd.readouterr()
    run_training("gpt_sft", given)
    assert f"continuing from {folder / 'step=3'}, step 3 of 6" in capfd.readouterr().out
    assert steps(tmp_path / "run") == whole
    assert same(last_stored(tmp_path / "run"), expected)
    assert not list(folder.glob("*-unfinished"))


@pytest.mark.parametrize("objective", slow_but(["rao"], ["rao", "dro"]))
def test_a_longer_run_goes_on_under_another_parallelism_and_its_own_schedule(
    objective: str, data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    constant = ("model.arch.hidden_dropout=0", "model.optim.sched.name=constant", f"model.objective={objective}")
    whole = overrides(tmp_path / "whole", data, start, *constant)
    run_training("gpt_rao", whole)
    split = overrides(tmp_path / "split", data, start, *constant)
    run_training("gpt_rao", [*split, "trainer.max_steps=3"])
    run_training("gpt_rao", [*split, *parallel(2, 2, 1)])
    expected, got = steps(tmp_path / "whole" / "run"), steps(tmp_path / "split" / "run")
    assert len(got) == len(expected) == NUM_STEPS
    for want, have in zip(expected, got, strict=True):
        assert have["lr"] == want["lr"] == pytest.approx(1e-3)
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _is_zombie(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_lines_of_steps_computed_again_are_dropped(tmp_path: Path) -> None:
    from nemo_rao.runtime.metrics_file import read_metrics, truncate_metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    truncate_metrics(path, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
