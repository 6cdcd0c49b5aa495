"""Runs that train on samples of their own policy: the same under any parallelism, and wherever they were stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..slow import slow_but
from .runs import (
    FOUR_LAYERS,
    die_in_call,
    in_fork,
    last_stored,
    make_data,
    parallel,
    run_training,
    same,
    start_checkpoint,
    steps,
)


def early_letters(prompt: str, response: str) -> float:
    """A reward that differs between the samples of a policy that has only begun to learn."""
    return sum(letter < "n" for letter in response) / max(len(response), 1)


def held_out(folder: Path, number: int) -> tuple[str, ...]:
    """So many prompts to validate on, two samples each; the overrides that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"Sort: {' '.join('hgfedcba'[at:])}"}) + "\n" for at in range(number)]
    (folder / "held_out.jsonl").write_text("".join(lines))
    keys = (f"data.validation_path={folder}/held_out.jsonl", "online.validation_generations=2")
    return (*keys, "trainer.val_check_interval=2")


def logged(folder: Path, metric: str) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` that have the metric."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if metric in record]


SCORED: list[str] = []
AWAY = "SCORER_IS_AWAY"


def letters_unless_away(prompt: str, response: str) -> float:
    """The same, but that from the second rollout on it fails as long as a file exists."""
    SCORED.append(response)
    away = Path(os.environ[AWAY])
    if away.exists() and len(SCORED) > (1 if away.read_text() else 48):  # the first call is before the run
        away.write_text("since an earlier start")
        raise OSError("nobody is there")
    return early_letters(prompt, response)


ONLINE = (
    f"online.reward=[rule:{__name__}:{early_letters.__name__}]",
    "online.num_generations=3",
    "online.max_new_tokens=7",
    "online.rows_at_once=9",
    "online.log_samples_every=2",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
)
SEVERAL_STEPS = ("online.mini_batches=2", "online.epochs=2")  # on each rollout


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("online")
    data = make_data(folder / "data")
    start = start_checkpoint(folder, [*FOUR_LAYERS, *data])
    return (*FOUR_LAYERS, *data, *ONLINE, f"model.restore_from_path={start}")


def _overrides(folder: Path, common: tuple[str, ...], *more: str) -> list[str]:
    return [*common, f"exp_manager.exp_dir={folder.parent}", f"exp_manager.name={folder.name}", *more]


def rollout(folder: Path, number: int) -> dict[str, np.ndarray]:
    with np.load(folder / "rollouts" / f"{number:06d}.npz") as stored:
        return {name: stored[name] for name in stored.files}


RECIPES = [
    ("gpt_rloo", ()),
    ("gpt_grpo", ("model.grpo.beta=0.1", *SEVERAL_STEPS)),
    ("gpt_ppo", (*SEVERAL_STEPS, "model.ppo.critic=shared", "model.ppo.value_lr=1e-2")),
    ("gpt_rpo_online", ("model.rpo.distance=sqloo",)),
    ("gpt_rao_online", ()),
]


@pytest.mark.parametrize(("recipe", "more"), slow_but([RECIPES[2]], RECIPES))
def test_the_same_samples_and_steps_under_any_parallelism(
    common: tuple[str, ...], tmp_path: Path, recipe: str, more: tuple[str, ...]
) -> None:
    more = (*more, "trainer.max_steps=3", *held_out(tmp_path, 5))
    run_training(recipe, _overrides(tmp_path / "alone", common, *more))
    # Of five prompts, two copies of the model validate on three and two.
    split = parallel(1, 2, 2) if recipe == "gpt_rpo_online" else (*parallel(2, 2, 1), "model.sequence_parallel=true")
    run_training(recipe, _overrides(tmp_path / "split", common, *more, *split))
    first, same = rollout(tmp_path / "alone", 0), rollout(tmp_path / "split", 0)
    for name in ("prompts", "tokens", "lengths", "is_cut", "rewards"):
        np.testing.assert_array_equal(first[name], same[name])
    np.testing.assert_allclose(first["reference"], same["reference"], atol=1e-3)
    if recipe == "gpt_ppo":  # the head starts at 0, and learns in the same way
        learned = [[step["ppo/value"] for step in steps(tmp_path / name)] for name in ("alone", "split")]
        assert learned[0][0] == 0 and abs(learned[0][2]) > 0.01
        np.testing.assert_allclose(*learned, rtol=1e-2)
    (before, *_), (found, *_) = (logged(tmp_path / name, "val/reward") for name in ("alone", "split"))
    assert before == pytest.approx(found, abs=1e-3) and before["step"] == 0 and before["val/reward"] > 0
    for one, other in zip(steps(tmp_path / "alone"), steps(tmp_path / "split"), strict=True):
        assert one.keys() == other.keys()
        # From the second rollout on, a draw on the border between two tokens may fall to either side.
        if one["step"] == 1:
            for name, value in one.items():
                if name not in ("rewards/accuracies", "grpo/clipped"):
                    assert other[name] == pytest.approx(value, rel=1e-3, abs=2e-4), name


def test_what_is_logged_and_kept_is_that_of_the_samples(common: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_training("gpt_rloo", _overrides(folder, common, "trainer.max_steps=3", *held_out(tmp_path, 5)))
    validated = logged(folder, "val/reward")
    assert [record["step"] for record in validated] == [0, 2, 3]
    assert len({record["val/entropy"] for record in validated}) == 3
    assert validated[0]["val/kl"] == pytest.approx(0, abs=1e-5) and abs(validated[2]["val/kl"]) > 1e-3
    of_steps = logged(folder, "rollout/reward")
    assert [record["step"] for record in of_steps] == [1, 2, 3]
    last = rollout(folder, 2)
    assert len(np.unique(last["rewards"])) > 3
    assert of_steps[-1]["rollout/reward"] == pytest.approx(last["rewards"].mean())
    assert (
        of_steps[-1]["rollout/length"] == last["lengths"].mean()
        and of_steps[-1]["rollout/cut"] == last["is_cut"].mean()
    )
    sums = np.array([part.sum() for part in np.split(last["logps"], np.cumsum(last["lengths"].flatten())[:-1])])
    assert of_steps[-1]["rollout/kl"] == pytest.approx((sums - last["reference"][:, 1]).mean(), abs=1e-5)
    assert of_steps[0]["rollout/kl"] == pytest.approx(0, abs=1e-5)  # the policy is the reference, and passes agree
    for phase in ("rollout", "reward", "reference"):
        seconds, speed = (of_steps[-1][f"{unit}/{phase}"] for unit in ("seconds", "tokens_per_second"))
        assert seconds * speed == pytest.approx(last["lengths"].sum())

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted({one["step"] for one in samples}) == [1, 3]
    for one in samples:
        assert len(one["responses"]) == 3
        for response in one["responses"]:
            assert response["reward"] == early_letters(one["prompt"], response["content"])
            assert response["scores"] == {"early_letters": response["reward"]}
    # The log-ratios of the first step are 0: its advantages are of the rewards alone.
    for one in (one for one in samples if one["step"] == 1):
        rewards = [response["reward"] for response in one["responses"]]
        for response in one["responses"]:
            others = (sum(rewards) - response["reward"]) / (len(rewards) - 1)
            assert response["advantage"] == pytest.approx(response["reward"] - others, abs=1e-5)


LORA = (
    "model.peft.scheme=lora",
    "model.peft.lora.target_modules=[all-linear,output_layer]",
    "model.peft.lora.dim=4",
    "model.optim.lr=1e-2",  # adapters begin at zero
    "trainer.max_steps=4",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
)


@pytest.mark.parametrize(
    ("recipe", "more"),
    slow_but(
        [("gpt_rloo", ())],
        [("gpt_rloo", ()), ("gpt_ppo", ("online.epochs=1", "model.ppo.value_lr=2e-2", "model.ppo.critic=shared"))],
    ),
)
def test_adapters_are_sampled_with_and_the_reference_is_without_them_also_after_a_kill(
    common: tuple[str, ...], tmp_path: Path, recipe: str, more: tuple[str, ...]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_training(recipe, _overrides(whole, common, *LORA, *more))
    with pytest.raises(AssertionError, match="was killed by SIGKILL"):
        in_fork(_die, "the third step", recipe, _overrides(killed, common, *LORA, *more))
    run_training(recipe, _overrides(killed, common, *LORA, *more))
    if recipe == "gpt_ppo":  # its head is trained in addition to the adapters, and stored with them
        assert abs(rollout(whole, 3)["values"]).max() > 0.01
    assert steps(killed) == steps(whole)
    for number in (2, 3):
        for name, values in rollout(whole, number).items():
            np.testing.assert_array_equal(rollout(killed, number)[name], values)
    first, *later = (record["rollout/kl"] for record in logged(whole, "rollout/kl"))
    assert first == pytest.approx(0, abs=1e-5)
    # The adapters have moved, and the reference has not.
    assert len(later) == 3 and all(abs(value) > 1e-3 for value in later)


def _die(where: str, recipe: str, overrides: list[str]) -> None:
    """Trains until rank 0 is killed: while it samples, before a rollout is scored, or at the end of a step."""
    from nemo_rao.loop.metrics import Metrics
    from nemo_rao.loop.rollout_parts import RolloutParts
    from nemo_rao.rollout import sampler

    from .runs import _train

    owner, name, number = {
        "sampling": (sampler, "sample", 2),
        "scoring": (RolloutParts, "rewarded", 2),
        "the third step": (Metrics, "after_step", 3),
        "the step behind a rollout": (Metrics, "after_step", 5),
        "a later step on it": (Metrics, "after_step", 7),
    }[where]
    die_in_call(owner, name, number)
    _train(recipe, overrides)


@pytest.mark.parametrize(
    "where",
    slow_but(["a later step on it"], ["sampling", "scoring", "the step behind a rollout", "a later step on it"]),
)
def test_a_run_that_was_killed_goes_on_bitwise(
    common: tuple[str, ...], tmp_path: Path, undisturbed: Path, where: str
) -> None:
    folder = tmp_path / "killed"
    keys = _overrides(folder, common, "model.grpo.beta=0.1", *KILLED)
    with pytest.raises(AssertionError, match="rank 0 was killed by SIGKILL"):
        in_fork(_die, where, "gpt_grpo", keys)
    sampled = folder / "rollouts" / "000001.npz"
    before = sampled.stat().st_mtime_ns if sampled.exists() else None
    assert (before is None) == (where == "sampling")
    (sampled.parent / ".000001.npz.01234567.tmp").touch()  # as if it had been killed while writing
    run_training("gpt_grpo", keys)
    assert all(path.suffix == ".npz" for path in sampled.parent.iterdir())
    if where in ("scoring", "a later step on it"):
        assert (rollout(folder, 1)["tokens"] == rollout(undisturbed, 1)["tokens"]).all()
    assert steps(folder) == steps(undisturbed)
    samples = (folder / "samples.jsonl").read_text()
    assert samples == (undisturbed / "samples.jsonl").read_text(), "none is missing or written twice"
    assert {json.loads(line)["step"] for line in samples.splitlines()} == {1, 5}
    for number in (0, 1):
        one, same = rollout(folder, number), rollout(undisturbed, number)
        assert one.keys() == same.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], same[name])


def test_a_run_whose_scorer_fails_is_saved_and_goes_on_bitwise(
    common: tuple[str, ...], tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = tmp_path / "failed", tmp_path / "away"
    rule = f"online.reward=['{early_letters.__name__}=rule:{__name__}:{letters_unless_away.__name__}']"
    never = "exp_manager.checkpoint_callback_params.every_n_train_steps=100"
    keys = _overrides(folder, common, "model.grpo.beta=0.1", *KILLED, rule, never, "online.scoring_attempts=1")
    monkeypatch.setenv(AWAY, str(away))
    away.touch()
    for _ in range(2):  # after a restart, too, nothing is lost or written twice
        with pytest.raises(AssertionError, match=r"RankFailure: online.reward: early_letters failed") as said:
            run_training("gpt_grpo", keys)
        assert "failed 1 times" in str(said.value) and "nobody is there" in str(said.value)
        assert f"The same command resumes from {folder}/checkpoints/step=4-last" in str(said.value)
        assert [one.name for one in (folder / "checkpoints").iterdir()] == ["step=4-last"]
        with_samples_alone = rollout(folder, 1).keys()
        assert with_samples_alone == rollout(undisturbed, 1).keys() - COMPUTED
    away.unlink()
    run_training("gpt_grpo", keys)
    assert steps(folder) == steps(undisturbed)
    assert same(last_stored(folder), last_stored(undisturbed))
    for name, values in rollout(undisturbed, 1).items():
        np.testing.assert_array_equal(rollout(folder, 1)[name], values)


COMPUTED = {"rewards", "scores/early_letters", "rewards_so_far", "reference", "reference_logps", "old_logps"}

# Two rollouts of four steps, and a checkpoint in the midst of each. Each rollout has a step that keeps samples.
KILLED = (
    "trainer.max_steps=8",
    "online.log_samples_every=5",
    *SEVERAL_STEPS,
    *parallel(1, 2, 1),
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
)


@pytest.fixture(scope="module")
def undisturbed(common: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training("gpt_grpo", _overrides(folder, common, "model.grpo.beta=0.1", *KILLED))
    return folder


@pytest.mark.slow
def test_values_stay_those_of_before_the_first_step_on_a_rollout(common: tuple[str, ...], tmp_path: Path) -> None:
    """Also after a kill behind later steps; they are not 0, as at the head's start."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = (*KILLED, "model.ppo.value_lr=1e-2")
    run_training("gpt_ppo", _overrides(whole, common, *more))
    with pytest.raises(AssertionError, match="rank 0 was killed by SIGKILL"):
        in_fork(_die, "a later step on it", "gpt_ppo", _overrides(killed, common, *more))
    run_training("gpt_ppo", _overrides(killed, common, *more))
    assert steps(killed) == steps(whole)
    assert not rollout(whole, 0)["values"].any() and abs(rollout(whole, 1)["values"]).max() > 0.01
    for name, values in rollout(whole, 1).items():
        np.testing.assert_array_equal(rollout(killed, 1)[name], values)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    explained = [record["ppo/explained_variance"] for record in records if "ppo/explained_variance" in record]
    assert len(explained) == 2 and explained[0] == 0
