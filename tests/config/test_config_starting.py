"""What a run would start from is checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rao.checkpoint import starting
from nemo_rao.checkpoint.starting import check_start, check_tokenizer, describe_start
from nemo_rao.config.architecture import approximate_parameters, architecture_fields, vocabulary
from nemo_rao.config.compose import compose
from nemo_rao.demo.tokenizer_training import train_tokenizer
from nemo_rao.errors import UserError
from nemo_rao.planning.parameters import stage_parameters
from nemo_rao.planning.plan import setting_of


def words(first: int, number: int) -> list[str]:
    return [f"word{index} wort{index * 7} {index}" for index in range(first, first + number)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(words(0, 3000), folder / "large", 2000)
    train_tokenizer(words(0, 300), folder / "small", 310)
    return folder


def with_tokenizer(folder: Path, tokenizer: Path | None) -> Path:
    """A checkpoint's folder, with the tokenizer that it was trained with, or without one."""
    (folder / "context").mkdir(parents=True)
    if tokenizer is not None:
        (folder / "context/tokenizer").symlink_to(tokenizer)
    return folder


def test_random_weights_of_a_large_model_are_refused_unless_asked_for(tmp_path: Path) -> None:
    large = ["model=llama3_8b", f"exp_manager.exp_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"restore_from_path: is null, .* 8\.0 billion .*allow_random_weights=true"):
        check_start(compose("gpt_rao", large))
    check_start(compose("gpt_rao", [*large, "model.allow_random_weights=true"]))
    check_start(compose("gpt_rao", [f"exp_manager.exp_dir={tmp_path}"]))


def test_the_start_is_described_in_one_line() -> None:
    config = compose("gpt_rao", ["trainer.seed=7"])
    assert describe_start(config, None) == (
        "starting from random weights (trainer.seed=7; model.restore_from_path is null)"
    )
    assert describe_start(config, Path("/checkpoints/base")) == "starting from /checkpoints/base"


@pytest.mark.parametrize("model", ["llama3_8b", "llama3_1_405b", "mixtral_8x7b", "qwen2_5_7b"])
def test_parameters_are_counted_to_a_hundredth(model: str) -> None:
    whole = ("tensor_model_parallel_size=1", "pipeline_model_parallel_size=1", "context_parallel_size=1")
    split = ("virtual_pipeline_model_parallel_size=null", "sequence_parallel=false", "expert_model_parallel_size=1")
    devices = ("trainer.devices=1", "trainer.num_nodes=1", "model.arch.extra={vocab_size: 128000}")
    config = compose("gpt_rao", [f"model={model}", *(f"model.{size}" for size in (*whole, *split)), *devices])
    expected = sum(one.size for one in stage_parameters(setting_of(config), 0))
    assert approximate_parameters(architecture_fields(config), 128000) == pytest.approx(expected, rel=0.01)


def test_a_tokenizer_whose_ids_stand_for_other_tokens_is_refused(tokenizers: Path, tmp_path: Path) -> None:
    checkpoint = with_tokenizer(tmp_path / "checkpoint", tokenizers / "large")
    config = compose("gpt_rao", [f"data.tokenizer={tokenizers}/small"])
    with pytest.raises(UserError, match=r"data.tokenizer=.*small: \d+ of the 2000 tokens .* missing or have other ids"):
        check_tokenizer(config, checkpoint, 310)
    check_tokenizer(compose("gpt_rao", [f"data.tokenizer={tokenizers}/large"]), checkpoint, 2000)


def test_a_tokenizer_with_added_tokens_is_accepted(tokenizers: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    checkpoint = with_tokenizer(tmp_path / "checkpoint", tokenizers / "large")
    extended = Tokenizer.from_file(str(tokenizers / "large/tokenizer.json"))
    extended.add_special_tokens(["<|new|>"])
    (tmp_path / "extended").mkdir()
    extended.save(str(tmp_path / "extended/tokenizer.json"))
    assert len(vocabulary(tmp_path / "extended/tokenizer.json")) == 2001
    check_tokenizer(compose("gpt_rao", [f"data.tokenizer={tmp_path}/extended"]), checkpoint, 2001)


def test_far_more_embeddings_than_tokens_are_refused_where_the_checkpoint_has_no_tokenizer(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = with_tokenizer(tmp_path / "checkpoint", None)
    config = compose("gpt_rao", [f"data.tokenizer={tokenizers}/small"])
    monkeypatch.setattr(starting, "token_embeddings", lambda *_, **__: 49152)
    with pytest.raises(UserError, match=r"has 310 tokens, but .* embeds 49152"):
        check_tokenizer(config, checkpoint, 310)
    monkeypatch.setattr(starting, "token_embeddings", lambda *_, **__: 1024)  # padded for eight tensor-parallel ranks
    check_tokenizer(config, checkpoint, 310)
