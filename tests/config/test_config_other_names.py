"""Names of other tools lead to this one's: every name of the table, and every target of it exists."""

from pathlib import Path

import pytest

from nemo_rao import cli, other_names
from nemo_rao.config.compose import compose, recipe_names
from nemo_rao.config.typed_config import known_keys, types_of_keys
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry

ROOT = Path(__file__).resolve().parents[2]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_every_target_of_the_table_exists() -> None:
    keys = types_of_keys()
    assert {key for here in other_names.KEYS.values() for key in here.keys} <= keys.keys()
    assert {text for text in other_names.OBJECTIVES.values() if " " not in text} <= registry.OBJECTIVES.keys()
    for text in other_names.COMMANDS.values():
        command, *arguments = text.split()
        assert command in cli.COMMANDS
        if "--config-name" in arguments:
            assert arguments[-1] in recipe_names([ROOT / "conf"])


def test_no_name_of_the_table_hides_one_of_ours() -> None:
    """A hint is only given where a name is unknown; as a whole key, none of them may be known."""
    assert not other_names.KEYS.keys() & types_of_keys().keys()
    assert not other_names.OBJECTIVES.keys() & registry.OBJECTIVES.keys()
    assert not other_names.COMMANDS.keys() & cli.COMMANDS.keys()


@pytest.mark.parametrize("name", sorted(other_names.KEYS.keys() - known_keys().keys()))
def test_every_key_of_another_tool_is_refused_with_its_counterpart(name: str) -> None:
    with pytest.raises(UserError) as error:
        compose("gpt_rao", [f"{name}=1"])
    assert str(error.value) == f"unknown key {name}; {other_names.KEYS[name]}"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("train", "trainer.learning_rate=1e-6"),
            ("unknown key trainer.learning_rate; the",),
        ),
        (("train", "model.dpo.learning_rate=1e-6"), ("the learning rate is model.optim.lr",)),
        (("train", "model.ipo.label_smoothing=0.1"), ("the keys of model.ipo are",)),
        (("train", "--learning-rate=1e-6"), ("key=value, without dashes", "the learning rate is model.optim.lr")),
        (("plan", "--lora_alpha", "16"), ("LoRA's alpha is model.peft.lora.alpha",)),
        (("train", "model=imported"), ("nemo-rao import-hf", "--config-dir")),
        (("train", "--config-name", "gspo"), ("no recipe named 'gspo'", "is ppo, rloo or grpo here")),
        (("train", "--config-name", "gpt_gspo_llama3_8b"), ("is ppo, rloo or grpo here",)),
        (("train", "--config-name", "ppo"), ("did you mean gpt_ppo",)),
        (("train", "--config-name", "dpo"), ("did you mean gpt_dpo",)),
        (("dpo",), ("nemo-rao dpo: no such command; that is nemo-rao train --config-name gpt_dpo",)),
        (("trian",), ("did you mean train?",)),
    ],
)
def test_other_names_on_the_command_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refusal(capsys, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("name", "said"),
    [("gspo", "an objective that samples while it trains is ppo, rloo or grpo here"), ("bt", "it is called rm here")],
)
def test_objectives_of_other_tools(name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"model\.objective={name}: no such objective; {said}"):
        registry.get(name)
