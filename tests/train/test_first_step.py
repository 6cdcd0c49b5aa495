"""The reference belongs to the network that a run trains, and the first step makes sure of it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ..megatron_ranks import import_once
from ..slow import slow_but
from .runs import NO_CHECKPOINTS, TINY, in_fork, parallel, run_training, steps


def overrides(folder: Path, name: str, data: Sequence[str], start: Path, *extra: str) -> list[str]:
    return [
        *(*TINY, *data, f"model.restore_from_path={start}", f"exp_manager.exp_dir={folder}"),
        *(f"exp_manager.name={name}", "model.objective=dpo", "trainer.max_steps=1", *extra),
    ]


def fails_with(recipe: str, given: Sequence[str], code: int) -> None:
    from nemo_rao.cli import main

    assert main(["train", "--config-name", recipe, *given]) == code


def sums(folder: Path) -> dict[str, Path]:
    """Key -> its file."""
    return {path.parent.name: path for path in (folder / "reference").glob("*/sums.npy")}


OTHER_BASE = "model.arch.rotary_base=100"
ONE_RANK, PP_2 = parallel(1, 1, 1), parallel(1, 2, 1)


@pytest.fixture(scope="module")
def two_bases(data: tuple[str, ...], start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The same weights under two rotary bases: the folder of both runs, and each one's sums."""
    folder = tmp_path_factory.mktemp("two_bases")
    run_training("gpt_rao", overrides(folder, "one", data, start, *NO_CHECKPOINTS))
    [one] = sums(folder).items()
    run_training("gpt_rao", overrides(folder, "other", data, start, *NO_CHECKPOINTS, OTHER_BASE))
    [other] = [path for key, path in sums(folder).items() if key != one[0]]
    return folder, one[1], other


def test_another_rotary_base_computes_its_own_reference(two_bases: tuple[Path, Path, Path]) -> None:
    one, other = (np.load(path) for path in two_bases[1:])
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize(
    ("fault", "ranks"),
    slow_but(
        [("one row wrong", PP_2)],
        itertools.product(["of another rotary base", "rows in another order", "one row wrong"], [ONE_RANK, PP_2]),
    ),
    ids=lambda value: {ONE_RANK: "one rank", PP_2: "PP 2"}.get(value),
)
def test_a_reference_that_is_not_the_starting_policys_stops_the_run_in_one_line(
    fault: str,
    ranks: tuple[str, ...],
    two_bases: tuple[Path, Path, Path],
    data: tuple[str, ...],
    start: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, one, other = two_bases
    wrong = np.load(one).copy()
    if fault == "of another rotary base":
        wrong = np.load(other)
    elif fault == "rows in another order":
        wrong = wrong[::-1]
    else:
        wrong[:, 1] += np.where(np.arange(len(wrong)) % 16 == 3, 0.5, 0)
    (tmp_path / "reference" / one.parent.name).mkdir(parents=True)
    np.save(tmp_path / "reference" / one.parent.name / "sums.npy", wrong)
    given = overrides(tmp_path, "run", data, start, *NO_CHECKPOINTS, *ranks, "model.global_batch_size=64")
    in_fork(fails_with, "gpt_rao", given, 2)
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "reference: the reference log-probabilities do not match the starting policy" in error
    assert "Delete the directory" in error
    assert not steps(tmp_path / "run"), "no step was taken"

    shutil.rmtree(tmp_path / "reference")
    run_training("gpt_rao", given)
    assert [step["step"] for step in steps(tmp_path / "run")] == [1]


def test_the_first_step_says_that_log_ratios_are_0_or_why_that_is_not_checked(
    data: tuple[str, ...], start: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    four = "model.global_batch_size=4"
    run_training("gpt_rao", overrides(tmp_path, "run", data, start, *parallel(2, 1, 1), four))
    run_training(
        "gpt_rao", overrides(tmp_path, "dropout", data, start, *NO_CHECKPOINTS, "model.arch.hidden_dropout=0.1")
    )
    run_training("gpt_rao", overrides(tmp_path, "run", data, start, four, "trainer.max_steps=2"))  # resumed
    checked, dropped_out = [line for line in capfd.readouterr().out.splitlines() if line.startswith("first step")]
    assert "are 0 up to rounding" in checked
    # Four prompts of the file, each with three or four responses; DPO compares responses alone, two of each.
    assert checked.endswith("8 rows")
    assert "not checked: they are not 0 with dropout" in dropped_out


def test_rows_of_mismatched_prompts_and_responses_are_checked_too(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    kto = ("model.objective=kto", "model.kto.threshold=0.6", *NO_CHECKPOINTS)
    run_training("gpt_rao", overrides(tmp_path, "run", data, start, *kto))
    first = {key: np.load(path).copy() for key, path in sums(tmp_path).items()}
    assert len(first) == 2  # of the rows, and of the mismatched ones
    for key, path in sums(tmp_path).items():
        np.save(path, first[key] - 1)
        with pytest.raises(AssertionError, match="do not match the starting policy"):
            run_training("gpt_rao", overrides(tmp_path, f"with_{key}", data, start, *kto))
        np.save(path, first[key])


def test_a_resumed_run_refuses_a_reference_that_has_been_deleted(
    data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    """It is never computed anew: the weights that it belongs to are gone."""
    given = overrides(tmp_path, "run", data, start)
    run_training("gpt_rao", given)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "reference")
    with pytest.raises(AssertionError, match=r"is missing, and has the reference .*Restore the directory"):
        run_training("gpt_rao", [*given, "trainer.max_steps=2"])
    assert not (tmp_path / "reference").exists()
    assert [json.loads(line) for line in before.splitlines()] == steps_as_written(tmp_path / "run")


def steps_as_written(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("params", "fp8", "experts", "tf32", "expected"),
    [
        ("fp32", None, False, False, 1e-4),
        ("fp32", None, False, True, 0.1),
        ("bf16", None, False, False, 0.1),
        ("fp16", None, False, False, 0.1),
        ("bf16", "hybrid", False, False, 0.3),
        ("fp32", None, True, False, 0.1),
        ("bf16", None, True, True, 0.3),
        ("bf16", "hybrid", True, False, 0.3),
    ],
)
def test_limits_are_those_of_the_coarsest_format(
    params: str, fp8: str | None, experts: bool, tf32: bool, expected: float
) -> None:
    from nemo_rao.config.run_config import PrecisionConfig
    from nemo_rao.loop.first_step import limits

    rms, largest = limits(PrecisionConfig(params=params, fp8=fp8), experts=experts, tf32=tf32)
    assert (rms, largest) == (expected, pytest.approx(10 * expected))


def test_a_run_of_an_earlier_version_finds_the_reference_that_it_was_begun_with(tmp_path: Path) -> None:
    """Checkpoints of before the key held the network name the weights alone; the sums are in the old place."""
    import_once()
    from nemo_rao.loop.reference import ReferencePass
    from nemo_rao.mcore.reference import earlier_reference_key

    data = SimpleNamespace(fingerprint=lambda: "d" * 64, num_responses=3)
    data_set = SimpleNamespace(data=data, reference=None)
    folder = tmp_path / earlier_reference_key(weights="w", data="d" * 64, precision="fp32")
    folder.mkdir()
    np.save(folder / "sums.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    sizes = {"micro_batch_size": 1, "micro_batches_per_part": 1}
    hook = ReferencePass({"training": data_set}, cache_dir=tmp_path, precision="fp32", **sizes)  # type: ignore[dict-item]
    hook.state = {"weights": "w"}
    hook.start(None)  # type: ignore[arg-type]
    assert np.asarray(data_set.reference).tolist() == [[0, 1], [2, 3], [4, 5]]
