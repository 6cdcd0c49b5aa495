"""Every key has one default and a comment, and what a user sets wrongly is refused with the key's name."""

import dataclasses
import pickle
from pathlib import Path

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.config.derived import data_cache_dir, objective_config, reference_dir, run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import known_keys
from nemo_rao.errors import UserError
from nemo_rao.keys import check
from nemo_rao.objectives.registry import OBJECTIVES


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose("gpt_rao", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_has_a_comment() -> None:
    assert not [key for key, spec in known_keys().items() if len(spec.comment) < 3]


def test_the_defaults_pass_their_own_checks() -> None:
    check(RunConfig())


def test_every_objective_has_its_block_with_its_own_config() -> None:
    assert {"rao", "dpo"} <= set(OBJECTIVES)
    for name in OBJECTIVES:
        config = compose("gpt_rao", [f"model.objective={name}"])
        assert type(objective_config(config)) is type(vars(RunConfig().model)[name])


def test_two_configs_share_no_mutable_value() -> None:
    one, other = RunConfig(), RunConfig()
    one.model.peft.lora.target_modules.append("x")
    one.model.arch.extra["x"] = 1
    assert other == RunConfig()


def test_a_config_survives_pickling() -> None:  # it is sent to other ranks
    config = compose("gpt_rao", ["trainer.max_steps=7", "model.rao.beta=0.25"])
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.optim.lrr=1e-6", "model.optim.lr?"),
        ("lr=1e-6", "model.optim.lr"),
        ("trainer.max_step=3", "trainer.max_steps?"),
        ("model.rao.betta=0.3", "model.rao.beta?"),
        ("model.rao={betta: 0.3}", "model.rao.beta?"),
        ("beta=0.3", "model.<objective>.beta"),
        ("model.tensor_parallel_size=2", "model.tensor_model_parallel_size"),
        ("+trainer.max_step=3", "trainer.max_steps?"),
        ("exp_manager.checkpoint_callback_params.save_topk=3", "save_top_k?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(override: str, nearest: str) -> None:
    message = refusal(override)
    assert message.startswith("unknown key") and nearest in message


def test_a_text_is_a_list_of_one_where_texts_are_expected() -> None:
    texts = {"online.reward": "rule:my_rules:exact_match", "model.peft.lora.target_modules": "linear_qkv"}
    config = compose("gpt_rloo", [f"{name}={text}" for name, text in texts.items()])
    assert config.online.reward == ["rule:my_rules:exact_match"]
    assert config.model.peft.lora.target_modules == ["linear_qkv"]
    assert compose("gpt_rloo", [f"{name}=[{text}]" for name, text in texts.items()]) == config


def test_a_key_like_no_other_points_to_the_list_of_keys() -> None:
    assert "--print-config" in refusal("xyzzy=3")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trainer.devices=abc", ("trainer.devices", "abc", "an integer")),
        ("trainer.devices=2.5", ("trainer.devices", "2.5", "an integer")),
        ("trainer.devices=true", ("trainer.devices", "an integer")),
        ("trainer.devices=0", ("trainer.devices", "0", ">= 1")),
        ("trainer.devices=", ("trainer.devices", "an integer")),
        ("trainer.accelerator=tpu", ("trainer.accelerator", "tpu", "cpu")),
        ("trainer.val_check_interval=0", ("trainer.val_check_interval", ">= 1")),
        ("data.strict=maybe", ("data.strict", "maybe", "true or false")),
        ("model.optim.lr=nan", ("model.optim.lr", "nan", "finite")),
        ("model.optim.lr=-1", ("model.optim.lr", "-1", "> 0")),
        ("model.optim.betas=[a,b]", ("model.optim.betas", "list")),
        ("model.optim.betas=[0.9,1.5]", ("model.optim.betas", "1.5", "<= 1")),
        ("model.peft.scheme=qlora", ("model.peft.scheme", "qlora", "lora")),
        ("model.peft.lora.target_modules=7", ("target_modules", "list")),
        ("model.rao.beta=-1", ("model.rao.beta", "-1")),
        ("precision.params=fp17", ("precision.params", "fp17", "bf16")),
        ("precision.fp8=e5m2", ("precision.fp8", "null, 'hybrid', 'e4m3'")),
        ("trainer=3", ("trainer=3", "group of keys", "trainer.engine")),
        ("trainer.devices=1,2", ("trainer.devices=1,2", "[1,2]")),
        ("~trainer.devices", ("~trainer.devices", "cannot be deleted")),
        ("trainer.devices", ("trainer.devices", "key=value")),
        ("=3", ("key=value",)),
        ("trainer.devices==", ("trainer.devices==", "cannot be parsed")),
        ("trainer.max_steps=${model.nothing}", ("trainer.max_steps", "model.nothing")),
        ("model=llama3_9b", ("model=llama3_9b", "did you mean llama3_8b")),
        ("precision=bf16", ("precision=bf16", "did you mean bf16_mixed")),
    ],
)
def test_a_bad_value_is_refused_in_one_line(override: str, parts: tuple[str, ...]) -> None:
    message = refusal(override)
    assert all(part in message for part in parts), message


def test_a_whole_number_is_taken_for_a_key_of_another_number_or_a_word() -> None:
    config = compose("gpt_rao", ["model.optim.lr=1", "model.rao.log_z0=50"])
    assert type(config.model.optim.lr) is float and config.model.optim.lr == 1.0
    assert objective_config(config).log_z0 == 50.0
    assert objective_config(compose("gpt_rao", ["model.rao.log_z0=auto"])).log_z0 == "auto"


@pytest.mark.parametrize(
    "text", ["2024_11_21", "~/a.jsonl", "a/model--val_loss=0.10-step=5", "it's", "dé/a.jsonl", "a b", "7", "true"]
)
def test_texts_are_taken_as_they_stand(text: str) -> None:
    assert compose("gpt_rao", [f"exp_manager.exp_dir={text}"]).exp_manager.exp_dir == text


def test_free_dictionaries_take_keys_of_their_own() -> None:
    config = compose("gpt_rao", ["model.arch.extra.qk_layernorm=true", "data.template_arguments={enable_thinking: no}"])
    assert config.model.arch.extra == {"qk_layernorm": True}
    assert config.data.template_arguments == {"enable_thinking": "no"}


def test_interpolations_reach_keys_that_only_have_defaults() -> None:
    assert compose("gpt_rao", ["trainer.seed=${data.seed}"]).trainer.seed == RunConfig().data.seed


def test_reference_log_probabilities_are_shared_by_the_runs_of_a_folder() -> None:
    config = compose("gpt_rao", ["exp_manager.exp_dir=/results", "exp_manager.name=a"])
    assert run_dir(config) == Path("/results/a")
    assert reference_dir(config) == Path("/results/reference")
    assert reference_dir(compose("gpt_rao", ["reference.cache_dir=/cache"])) == Path("/cache")


def test_tokenized_data_is_shared_by_the_runs_of_a_folder_unless_it_is_not_to_be_kept() -> None:
    assert data_cache_dir(compose("gpt_rao", ["exp_manager.exp_dir=/results"])) == Path("/results/tokenised")
    assert data_cache_dir(compose("gpt_rao", ["data.cache_dir=/cache"])) == Path("/cache")
    assert data_cache_dir(compose("gpt_rao", ["data.cache_dir=/cache", "data.cache=false"])) is None


def test_defaults_are_in_the_dataclasses_alone() -> None:
    assert all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for config_type in (RunConfig, *(type(section) for section in vars(RunConfig()).values()))
        for field in dataclasses.fields(config_type)
    )
