"""What a run says of keys that its data decides, and of targets far from where it starts."""

import pytest

from nemo_rao.batch import RewardSummary
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import objective_config
from nemo_rao.objectives import registry
from nemo_rao.training.targets import say_targets

UNIT = RewardSummary(mean=0.6, low=0.0, high=1.0)


def said(capsys: pytest.CaptureFixture[str], recipe: str, rewards: RewardSummary, *overrides: str) -> list[str]:
    config = compose(recipe, overrides)
    resolved = registry.get(config.model.objective).resolve(objective_config(config), rewards)
    say_targets(config, resolved, rewards)
    return capsys.readouterr().out.splitlines()


def test_the_value_of_auto_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "gpt_rao", UNIT) == ["model.rao.log_z0=auto: 6, from the training data"]
    attributes = RewardSummary(mean=2.0, low=0.0, high=4.0, num_columns=5)
    assert said(capsys, "gpt_rm_regression", attributes) == [
        "model.rm_regression.num_attributes=null: 5, from the training data"
    ]
    assert said(capsys, "gpt_dpo", UNIT) == []


@pytest.mark.parametrize(
    ("recipe", "overrides", "mean", "nats", "remedy"),
    [
        ("gpt_rao", ("model.rao.log_z0=50",), 0.6, "-44 nats", "model.rao.log_z0=6 (auto) centers it"),
        ("gpt_rao_llama3_8b", (), 0.6, "-44 nats", "model.rao.log_z0=6 (auto) centers it"),
        ("gpt_dro", (), 7.0, "7 nats", "nemo-rao score --shift=7"),
        (
            "gpt_sppo",
            ("model.sppo.win_probability=rewards",),
            0.8,
            "300 nats",
            "win_probability=bradley_terry centers it",
        ),
    ],
)
def test_a_mean_target_far_from_the_start_is_one_line_with_what_centers_it(
    capsys: pytest.CaptureFixture[str], recipe: str, overrides: tuple[str, ...], mean: float, nats: str, remedy: str
) -> None:
    rewards = RewardSummary(mean=mean, low=0.0, high=max(1.0, mean) if recipe == "gpt_dro" else 1.0)
    [line] = said(capsys, recipe, rewards, *overrides)
    assert line.startswith("warning: ") and f"is {nats} per response" in line and remedy in line
    assert ("gain" in line) == (not nats.startswith("-"))


def test_a_mean_target_near_the_start_is_not_worth_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "gpt_rao", UNIT, "model.rao.log_z0=10.9") == []
    assert said(capsys, "gpt_dro", UNIT) == []
