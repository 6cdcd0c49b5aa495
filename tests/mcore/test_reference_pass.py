"""The reference pass: the right numbers under any parallelism, nothing computed twice, nothing half-written read."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rao.batch import MicroBatch
from nemo_rao.errors import RankFailure

from ..megatron_ranks import import_once, run_ranks
from ..train.runs import start_fork
from . import tiny
from .tiny import Layout

SAMPLES = tiny.preferences(11)
NUMBERS = tiny.response_numbers(SAMPLES)
NUM_RESPONSES = NUMBERS[-1][-1] + 1
KEY = "key"

LAYOUTS = {
    "DP 2": Layout(),
    "TP 2 with sequence parallelism": Layout(tensor=2, sequence_parallel=True),
    "PP 2": Layout(pipeline=2),
}


class Interrupted(Exception):
    """Stands for whatever stops a pass."""


def compute(
    weights: Any, layout: Layout, cache: Path, after_part: Callable[[int], None] | None = None
) -> tuple[np.ndarray, list[int], bool]:
    """Run the pass on this rank, two prompts a micro-batch, one micro-batch a part.

    Args:
        after_part: called with the number of parts that this rank has finished.

    Returns:
        the sums, the prompts of the micro-batches that this rank made, and whether the model was left in training mode.
    """
    from nemo_rao.mcore.reference import compute_reference

    tiny.enter(layout)
    model = tiny.build(weights, layout).train()
    made: list[int] = []
    parts = 0

    def make(prompts: Sequence[int]) -> MicroBatch:
        made.extend(prompts)
        return tiny.micro_batch(SAMPLES, prompts)

    def progress(done: int, of: int) -> None:
        nonlocal parts
        parts += 1
        assert 0 < done <= of
        if after_part is not None:
            after_part(parts)

    sums = compute_reference(
        [model],
        prompts=NUMBERS,
        make_micro_batch=make,
        micro_batch_size=2,
        micro_batches_per_part=1,
        vocab_size=tiny.VOCAB,
        cache_dir=cache,
        key=KEY,
        progress=progress,
    )
    return np.array(sums), made, model.training


def every_layout(weights: Any, folder: Path) -> dict[str, Any]:
    return {name: compute(weights, layout, folder / name) for name, layout in LAYOUTS.items()}


def one_layout(
    weights: Any, layout: Layout, cache: Path, after_part: Callable[[int], None] | None = None
) -> tuple[np.ndarray, list[int], bool]:
    return compute(weights, layout, cache, after_part)


@pytest.fixture(scope="module")
def weights() -> Any:
    import_once()
    return tiny.whole_tensors(tiny.llama())


@pytest.fixture(scope="module")
def dense_sums(weights: Any) -> np.ndarray:
    return tiny.dense_sums(tiny.llama(), SAMPLES).detach().numpy()


@pytest.fixture(scope="module")
def complete(weights: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("complete")
    return folder, run_ranks(every_layout, (weights, folder), num_ranks=2)


def assert_right(sums: np.ndarray, dense_sums: np.ndarray) -> None:
    assert sums.shape == (NUM_RESPONSES, 2)
    np.testing.assert_allclose(sums, dense_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_a_dense_model_row_by_row(
    complete: tuple[Path, list[dict[str, Any]]], dense_sums: np.ndarray, layout: str
) -> None:
    for rank in complete[1]:
        assert_right(rank[layout][0], dense_sums)


def test_every_prompt_is_computed_once_and_data_parallel_ranks_share_them(
    complete: tuple[Path, list[dict[str, Any]]],
) -> None:
    first, second = ([rank[name][1] for name in LAYOUTS] for rank in complete[1])
    prompts = list(range(len(SAMPLES)))
    assert sorted(first[0] + second[0]) == prompts
    assert abs(len(first[0]) - len(second[0])) <= 1
    assert first[1:] == second[1:] == [prompts, prompts]


def test_model_is_left_in_training_mode(complete: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all(rank[layout][2] for rank in complete[1] for layout in LAYOUTS)


def test_a_finished_cache_is_read_back_without_a_forward_pass(
    complete: tuple[Path, list[dict[str, Any]]], weights: Any, dense_sums: np.ndarray
) -> None:
    folder = complete[0]
    assert os.listdir(folder / "DP 2" / KEY) == ["sums.npy"]  # the parts are gone
    for sums, made, _ in run_ranks(one_layout, (weights, LAYOUTS["PP 2"], folder / "DP 2"), num_ranks=2):
        assert made == []
        assert_right(sums, dense_sums)


def prompts_on_disk(cache: Path) -> set[int]:
    known: set[int] = set()
    for path in (cache / KEY).glob("part-*.npz"):
        known.update(np.load(path)["responses"].tolist())
    return {i for i, responses in enumerate(NUMBERS) if known.issuperset(responses)}


def stop_after_two(parts: int) -> None:
    # On the rank that has written them, so that two parts are on disk.
    if parts == 2 and os.environ["RANK"] == "0":
        raise Interrupted


def kill_after_two(parts: int) -> None:
    if parts == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("before", "after", "interruption", "message"),
    [
        ("DP 2", "PP 2", stop_after_two, "Interrupted"),
        ("PP 2", "TP 2 with sequence parallelism", kill_after_two, "SIGKILL"),
        ("TP 2 with sequence parallelism", "DP 2", stop_after_two, "Interrupted"),
    ],
)
def test_an_interrupted_pass_goes_on_with_what_is_missing_under_another_parallelism(
    weights: Any,
    dense_sums: np.ndarray,
    tmp_path: Path,
    before: str,
    after: str,
    interruption: Callable[[int], None],
    message: str,
) -> None:
    with pytest.raises(RankFailure, match=message):
        run_ranks(one_layout, (weights, LAYOUTS[before], tmp_path, interruption), num_ranks=2)
    done = prompts_on_disk(tmp_path)
    missing = set(range(len(SAMPLES))) - done
    assert done and missing
    assert not (tmp_path / KEY / "sums.npy").exists()

    results = run_ranks(one_layout, (weights, LAYOUTS[after], tmp_path), num_ranks=2)
    made = [prompt for _, prompts, _ in results for prompt in prompts]
    copies = 1 if after == "DP 2" else 2  # model-parallel ranks go through the same micro-batches
    assert sorted(made) == sorted(copies * list(missing))
    for sums, _, _ in results:
        assert_right(sums, dense_sums)


def test_truncated_parts_count_as_absent_and_temporaries_are_never_read(
    weights: Any, dense_sums: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure, match="Interrupted"):
        run_ranks(
            one_layout, (weights, LAYOUTS["TP 2 with sequence parallelism"], tmp_path, stop_after_two), num_ranks=2
        )
    folder = tmp_path / KEY
    before = prompts_on_disk(tmp_path)
    first, *others = sorted(folder.glob("part-*.npz"))
    assert others
    lost = set(np.load(first)["responses"].tolist())
    first.write_bytes(first.read_bytes()[:-40])  # the end of a zip file holds its list of contents
    wrong = np.full((NUM_RESPONSES, 2), -1.0, dtype=np.float32)
    with (folder / ".part-0-99-100.npz.17.tmp").open("wb") as file:
        np.savez(file, responses=np.arange(NUM_RESPONSES), sums=wrong)
    with (folder / ".sums.npy.17.tmp").open("wb") as file:
        np.save(file, wrong)

    results = run_ranks(one_layout, (weights, LAYOUTS["DP 2"], tmp_path), num_ranks=2)
    made = sorted(prompt for _, prompts, _ in results for prompt in prompts)
    assert made == [i for i, numbers in enumerate(NUMBERS) if i not in before or lost.intersection(numbers)]
    for sums, _, _ in results:
        assert_right(sums, dense_sums)


def test_another_key_shares_nothing() -> None:
    from nemo_rao.mcore.reference import reference_key

    parts = {"weights": "0123", "network": "cdef", "data": "4567", "precision": "fp32"}
    keys = {reference_key(**parts)} | {reference_key(**{**parts, name: "89ab"}) for name in parts}
    assert len(keys) == 5
    assert reference_key(**parts) == reference_key(**dict(reversed(parts.items())))


def nan_weights(weights: Any, cache: Path) -> None:
    broken = {**weights, "decoder.final_layernorm.weight": weights["decoder.final_layernorm.weight"] * float("nan")}
    compute(broken, Layout(), cache)


def test_sums_that_are_not_finite_are_refused_and_not_kept(weights: Any, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=f"of {NUM_RESPONSES} responses are not finite"):
        run_ranks(nan_weights, (weights, tmp_path), num_ranks=2)
    assert not (tmp_path / KEY / "sums.npy").exists()


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def pause_after(parts_done: int, reached: Path, goes_on: Path, parts: int) -> None:
    """All ranks of a run stop after so many parts until they are let go on."""
    if parts == parts_done:
        reached.with_name(f"{reached.name}-{os.environ['RANK']}").touch()
        wait_for(goes_on)


def in_another_world(folder: Path, name: str, *arguments: Any) -> Any:
    """A run on two ranks of its own, started; it leaves its results as ``name``.pickle."""

    def run() -> None:
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(run_ranks(one_layout, arguments, num_ranks=2)))

    process, failure = start_fork(run)
    return process, failure, folder / f"{name}.pickle"


def result(world: Any) -> Any:
    process, failure, path = world
    process.join()
    assert process.exitcode == 0, failure.recv()
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("parts_done", [1, 3], ids=["in the middle", "at the end"])
def test_two_runs_at_once_both_end_with_right_sums_and_remove_their_parts(
    weights: Any, dense_sums: np.ndarray, tmp_path: Path, parts_done: int
) -> None:
    """The first one is held up until the second has finished, and removed everybody's parts."""
    cache, reached, goes_on = tmp_path / "cache", tmp_path / "reached", tmp_path / "goes_on"
    held_up = functools.partial(pause_after, parts_done, reached, goes_on)
    first = in_another_world(tmp_path, "first", weights, LAYOUTS["DP 2"], cache, held_up)
    for rank in range(2):
        wait_for(tmp_path / f"reached-{rank}")
    second = result(in_another_world(tmp_path, "second", weights, LAYOUTS["PP 2"], cache))
    assert os.listdir(cache / KEY) == ["sums.npy"]
    goes_on.touch()
    assert any(made for _, made, _ in second) == (parts_done == 1)  # else it found all parts there
    for sums, _, _ in [*result(first), *second]:
        assert_right(sums, dense_sums)
    assert os.listdir(cache / KEY) == ["sums.npy"]


def test_a_run_that_is_killed_beside_another_does_not_take_it_along(
    weights: Any, dense_sums: np.ndarray, tmp_path: Path
) -> None:
    cache, reached, goes_on = tmp_path / "cache", tmp_path / "reached", tmp_path / "goes_on"
    first = in_another_world(
        tmp_path, "first", weights, LAYOUTS["DP 2"], cache, functools.partial(pause_after, 2, reached, goes_on)
    )
    for rank in range(2):
        wait_for(tmp_path / f"reached-{rank}")
    before = prompts_on_disk(cache)
    with pytest.raises(RankFailure, match="Interrupted"):
        run_ranks(one_layout, (weights, LAYOUTS["PP 2"], cache, stop_after_two), num_ranks=2)
    assert prompts_on_disk(cache) > before  # both have left parts
    goes_on.touch()
    for sums, _, _ in result(first):
        assert_right(sums, dense_sums)
    assert os.listdir(cache / KEY) == ["sums.npy"]


def test_parts_that_vanish_while_they_are_read_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_rao.mcore import reference

    for number in range(3):
        np.savez(tmp_path / f"part-a-{number}.npz", responses=np.array([number]), sums=np.full((1, 2), number, "f4"))
    load = np.load

    def load_and_remove(path: Path, **keywords: Any) -> Any:
        (tmp_path / "part-a-1.npz").unlink(missing_ok=True)  # by a run that has finished
        return load(path, **keywords)

    monkeypatch.setattr(reference.np, "load", load_and_remove)
    np.testing.assert_array_equal(reference._read_parts(tmp_path, 3, 2)[:, 0], [0, np.nan, 2])
