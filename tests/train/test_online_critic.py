"""PPO with a critic that is a model of its own: the same under any parallelism, and wherever the run was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_rao.errors import UserError

from .changed_runs import changed_run
from .runs import (
    FOUR_LAYERS,
    TINY,
    die_in_call,
    in_fork,
    last_stored,
    make_data,
    parallel,
    run_training,
    same,
    start_checkpoint,
    steps,
    stored,
)
from .test_online import ONLINE, _overrides, logged, rollout

# Of another size than the policy.
SMALL = ("model.arch.hidden_size=32", "model.arch.ffn_hidden_size=64")
# Two rollouts of three steps, and a checkpoint in the midst of each.
PPO = (
    "model.ppo.critic=model",
    "model.ppo.value_lr=2e-3",
    "online.mini_batches=3",
    "online.epochs=1",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
)
TIMES = ("seconds/critic",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    keys = [f"exp_manager.exp_dir={folder}", "exp_manager.name=rm", "trainer.max_steps=3"]
    run_training("gpt_rm", [*TINY, *SMALL, *data, *keys])
    return folder / "rm"


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...], reward_model: Path) -> tuple[str, ...]:
    start = start_checkpoint(tmp_path_factory.mktemp("start"), [*FOUR_LAYERS, *data])
    keys = (f"model.restore_from_path={start}", f"model.ppo.critic_path={reward_model}")
    return (*FOUR_LAYERS, *data, *ONLINE, *PPO, *keys)


@pytest.fixture(scope="module")
def alone(common: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_training("gpt_ppo", _overrides(folder, common, "trainer.max_steps=6"))
    return folder


def of_critic(folder: Path) -> list[dict[str, Any]]:
    """What the critic has logged, but for the time that it took."""
    found = logged(folder, "ppo/value_loss")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


def test_it_starts_from_a_reward_model_with_its_head_and_learns_apart_from_the_policy(
    alone: Path, reward_model: Path
) -> None:
    records = of_critic(alone)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    first, of_policy = records[0], steps(alone)[0]
    assert set(first) == {
        *("step", "ppo/value", "ppo/value_loss", "ppo/value_clipped", "ppo/critic_grad_norm", "ppo/critic_lr")
    }
    assert not set(of_policy) & (set(first) - {"step"})
    assert first["ppo/critic_lr"] == 2e-3 and of_policy["lr"] == pytest.approx(1e-3)
    values = rollout(alone, 0)["values"]
    assert len(values) == rollout(alone, 0)["lengths"].sum() and np.ptp(values) > 1e-3
    head = stored_critic(alone / "checkpoints" / "step=6-last", "value_head.weight")
    (score_head,) = (one for name, one in last_stored(reward_model).items() if name == "module.score_head.weight")
    assert 0 < (head - score_head).abs().max() < 0.02  # six steps of Adam away
    assert not any("value_head" in name for name in last_stored(alone)), "the policy has none"
    explained = [record["ppo/explained_variance"] for record in logged(alone, "ppo/explained_variance")]
    assert len(explained) == 2 and explained[0] != 0


def stored_critic(checkpoint: Path, name: str | None = None) -> Any:
    """All that a checkpoint has of the critic, or a weight."""
    found = stored(checkpoint, "critic")
    return found if name is None else found[f"module.{name}"]


@pytest.mark.slow
def test_the_same_on_any_ranks_and_where_a_run_goes_on_with_others(
    common: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "split"
    # The policy's part of its checkpoints is written in the background.
    in_background = "exp_manager.checkpoint_callback_params.async_save=true"
    first = (*parallel(2, 2, 1), "model.sequence_parallel=true", "trainer.max_steps=4", in_background)
    run_training("gpt_ppo", _overrides(folder, common, *first))
    run_training("gpt_ppo", _overrides(folder, common, *parallel(1, 1, 2), "trainer.max_steps=6"))
    for number in (0, 1):
        np.testing.assert_array_equal(rollout(folder, number)["tokens"], rollout(alone, number)["tokens"])
        np.testing.assert_allclose(rollout(folder, number)["values"], rollout(alone, number)["values"], atol=1e-5)
    for one, other in zip(of_critic(folder), of_critic(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), one["step"]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_the_critic_goes_on_bitwise(
    common: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    keys = _overrides(folder, common, "trainer.max_steps=6")
    with pytest.raises(AssertionError, match="was killed by SIGKILL"):
        in_fork(_die_at_the_second_checkpoint, keys)
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "step=4" / "weights").is_dir() and (checkpoints / "step=4-unfinished").exists()
    run_training("gpt_ppo", keys)
    assert steps(folder) == steps(alone) and of_critic(folder) == of_critic(alone)
    for number in (0, 1):
        for name, values in rollout(alone, number).items():
            np.testing.assert_array_equal(rollout(folder, number)[name], values)
    assert same(last_stored(folder), last_stored(alone))
    last = "step=6-last"
    assert same(stored_critic(checkpoints / last), stored_critic(alone / "checkpoints" / last))


def _die_at_the_second_checkpoint(keys: list[str]) -> None:
    from nemo_rao.mcore.trained_model import TrainedModel

    from .runs import _train

    die_in_call(TrainedModel, "save", 2)
    _train("gpt_ppo", keys)


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (
            {},
            ["model.ppo.critic=head"],
            r"critic_path=.*rm: has no effect with model.ppo.critic=head. Set model.ppo.critic to model",
        ),
        ({}, ["model.ppo.value_weight=0.5"], "value_weight=0.5: has no effect with model.ppo.critic=model"),
        ({}, ["model.ppo.critic_path=/nowhere"], "critic_path=/nowhere: has no recipe.yaml. Give the directory of a"),
        (
            {},
            ["model.ppo.critic_path=null", "model.restore_from_path=null", "model.ppo.kl_coef=0"],
            "critic=model: needs a checkpoint to start from, but model.ppo.critic_path and model.restore_from_path are",
        ),
        (
            {"scheme: none": "scheme: lora"},
            [],
            r"rm: trained only adapters \(lora\). Name a run that trained all weights",
        ),
        ({}, ["model.seq_length=128"], "trained with model.seq_length=64, but samples with their prompts may have 128"),
        ({"chat_template: auto": "chat_template: never"}, [], "rm: was trained with data.chat_template=never"),
        ({"/tokenizer ": "/other "}, [], "tokens are missing there or have other ids; train the critic's run with"),
    ],
)
def test_one_line_reports_what_does_not_fit_before_the_engine_is_imported(
    common: tuple[str, ...],
    reward_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, str],
    overrides: list[str],
    said: str,
) -> None:
    from nemo_rao.config.compose import compose
    from nemo_rao.engines.engine import engine_of
    from nemo_rao.training.checks import check_run
    from nemo_rao.training.prepare import prepare

    run = changed_run(reward_model, tmp_path, recipe)
    keys = [*common, f"model.ppo.critic_path={run}", f"exp_manager.exp_dir={tmp_path}", *overrides]
    with pytest.raises(UserError, match=said) as refused:
        config = compose("gpt_ppo", keys)
        monkeypatch.setattr(engine_of(config), "load", lambda: pytest.fail("the engine was imported"))
        check_run(config)
        prepare(config)
    assert str(refused.value).startswith("model.ppo.") and "\n" not in str(refused.value)


def test_a_run_cannot_go_on_with_another_kind_of_critic(common: tuple[str, ...], alone: Path) -> None:
    from nemo_rao.checkpoint.continuing import check_settings
    from nemo_rao.config.compose import compose

    anyway = "exp_manager.resume_with_changes=true"
    for change in ("model.ppo.critic_path=null", "model.ppo.critic=head"):
        others = [key for key in common if not change.endswith("head") or "critic_path" not in key]
        with pytest.raises(UserError, match=f"changes .*{change.partition('=')[0]} from"):
            check_settings(compose("gpt_ppo", _overrides(alone, tuple(others), change, anyway)))
    changes = check_settings(compose("gpt_ppo", _overrides(alone, common, "model.ppo.value_lr=1e-3", anyway)))
    assert [one.loads for one in changes if one.key == "model.ppo.value_lr"] == [True]
