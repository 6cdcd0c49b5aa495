"""Parameters and states of each rank are those of Megatron's models, buffers and optimizer, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_rao.config.compose import compose, override
from nemo_rao.planning.buffers import stage_states
from nemo_rao.planning.parameters import stage_parameters
from nemo_rao.planning.plan import setting_of

from ..engines import ENGINE, NEMO
from .children import in_child
from .meta_models import ranks_of

TOKENS = 1003  # no multiple of anything, so that the vocabulary is padded
TINY = ("model.arch.num_layers=4", "model.arch.hidden_size=96", "model.arch.ffn_hidden_size=200")
MIXTURE = (*TINY, "model.family=mixtral", "model.arch.extra={num_moe_experts: 4}")
INTERLEAVED = ("model.virtual_pipeline_model_parallel_size=2",)
OVERLAPPED = ("model.optim.overlap_grad_reduce=true", "model.optim.overlap_param_gather=true")
SEQUENCE = ("model.sequence_parallel=true",)
DEALT = "{account_for_embedding_in_pipeline_split: true, account_for_loss_in_pipeline_split: true}"
PRESET = f"model.arch.extra={{vocab_size: {TOKENS + 5}}}"


def parallel(tensor: int, pipeline: int, devices: int) -> tuple[str, ...]:
    return (
        f"model.tensor_model_parallel_size={tensor}",
        f"model.pipeline_model_parallel_size={pipeline}",
        f"trainer.devices={devices}",
        "model.micro_batch_size=1",
        "model.global_batch_size=48",
    )


def experts(shared: int, each: int | None = None) -> tuple[str, ...]:
    return (
        f"model.expert_model_parallel_size={shared}",
        f"model.expert_tensor_parallel_size={'null' if each is None else each}",
    )


OF_NEMO = "LayerNorm, biases, learned positions, normed queries"  # a class of NeMo alone has all of these

# Recipe, overrides.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Llama 3 8B as published": ("gpt_rao_llama3_8b", ()),
    "Llama 3 8B, PP 2": ("gpt_rao_llama3_8b", parallel(2, 2, 4)),
    "Llama 3 8B, LoRA": (
        "gpt_rao_llama3_8b",
        (*parallel(2, 1, 2), "model.peft.scheme=lora", "model.restore_from_path=x"),
    ),
    "Qwen2.5 7B, biases": ("gpt_rao_qwen2_5_7b", parallel(4, 1, 4)),
    "EuroLLM's widths, three copies": (
        "gpt_rao_eurollm_9b",
        (*parallel(1, 2, 6), "model.arch.num_layers=4", "model.sequence_parallel=false"),
    ),
    "tied": (
        "gpt_rao",
        (*TINY, *parallel(2, 2, 12), "model.arch.share_embeddings_and_output_weights=true", "precision.params=bf16"),
    ),
    "tied, one stage": ("gpt_rao", (*TINY, *parallel(2, 1, 2), "model.arch.share_embeddings_and_output_weights=true")),
    "no distributed optimizer": (
        "gpt_rao",
        (*TINY, *parallel(1, 2, 4), "model.optim.use_distributed_optimizer=false", "precision.params=bf16"),
    ),
    "gradients in bf16": (
        "gpt_rao",
        (*TINY, *parallel(2, 1, 4), "precision.params=bf16", "precision.grad_reduce_in_fp32=false"),
    ),
    OF_NEMO: (
        "gpt_rao",
        (
            *TINY,
            *parallel(2, 1, 6),
            "model.config_class=GPTConfig",
            "model.arch.extra={qk_layernorm: true, bias_activation_fusion: false}",
        ),
    ),
    "vocabulary of its own": ("gpt_rao", (*TINY, *parallel(2, 1, 2), PRESET)),
    "value head": ("gpt_rao", (*TINY, *parallel(1, 2, 6), "model.objective=dro")),
    "value head beside adapters": (
        "gpt_rao",
        (*TINY, *parallel(1, 2, 6), "model.peft.scheme=lora", "model.restore_from_path=x", "model.objective=dro"),
    ),
    "reward model": ("gpt_rao", (*TINY, *parallel(1, 2, 4), "model.objective=rm")),
    "tied reward model": (
        "gpt_rao",
        (
            *TINY,
            *parallel(1, 2, 4),
            "model.objective=rm",
            "model.arch.share_embeddings_and_output_weights=true",
        ),
    ),
    "chunks of an interleaved pipeline": ("gpt_rao", (*TINY, *parallel(1, 2, 4), *INTERLEAVED, *OVERLAPPED)),
    "embedding and loss dealt as layers": (
        "gpt_rao",
        (*TINY, *parallel(2, 2, 4), *INTERLEAVED, "model.arch.num_layers=6", f"model.arch.extra={DEALT}"),
    ),
    "split sequences": ("gpt_rao", (*TINY, *parallel(1, 1, 12), "model.context_parallel_size=2")),
    "split sequences, tied, interleaved": (
        "gpt_rao",
        (
            *TINY,
            *parallel(2, 2, 16),
            *INTERLEAVED,
            "model.context_parallel_size=2",
            "model.arch.share_embeddings_and_output_weights=true",
        ),
    ),
    "experts on every rank": ("gpt_rao", (*MIXTURE, *parallel(1, 2, 6))),
    "experts shared by all copies": ("gpt_rao", (*MIXTURE, *parallel(1, 1, 4), *experts(4), *OVERLAPPED)),
    "experts shared by some copies": (
        "gpt_rao",
        (*MIXTURE, *parallel(1, 2, 24), *experts(2), "precision.params=bf16"),
    ),
    "experts split, too": ("gpt_rao", (*MIXTURE, *SEQUENCE, *parallel(2, 1, 12), *experts(2))),
    "experts whole where layers are split": (
        "gpt_rao",
        (*MIXTURE, *SEQUENCE, *parallel(2, 2, 16), *INTERLEAVED, *experts(4, 1), "model.context_parallel_size=2"),
    ),
    "experts, no distributed optimizer": (
        "gpt_rao",
        (*MIXTURE, *parallel(1, 1, 4), *experts(2), "model.optim.use_distributed_optimizer=false"),
    ),
    "adapter on the output layer": (
        "gpt_rao",
        (
            *TINY,
            *parallel(2, 2, 4),
            "model.peft.scheme=lora",
            "model.restore_from_path=x",
            "model.peft.lora.target_modules=[linear_proj,output_layer]",
        ),
    ),
    "adapter on a tied output layer": (
        "gpt_rao",
        (
            *TINY,
            *parallel(1, 1, 2),
            "model.arch.share_embeddings_and_output_weights=true",
            "model.peft.scheme=lora",
            "model.restore_from_path=x",
            "model.peft.lora.target_modules=[output_layer]",
        ),
    ),
    "adapters by pattern": (
        "gpt_rao",
        (
            *TINY,
            *parallel(2, 1, 2),
            "model.peft.scheme=lora",
            "model.restore_from_path=x",
            "model.peft.lora.target_modules=['*.layers.*.linear_qkv',linear_fc2]",
        ),
    ),
    "adapters of some layers and of the output layer": (
        "gpt_rao",
        (
            *TINY,
            *parallel(2, 2, 4),
            *INTERLEAVED,
            "model.peft.scheme=lora",
            "model.restore_from_path=x",
            "model.peft.lora.target_modules=['*.layers.0.*','*.layers.1.*.linear_qkv','*.layers.2.*.linear_fc2',lm_head]",
        ),
    ),
}


PLANNED = [name for name in CASES if name != OF_NEMO or ENGINE == NEMO]


@pytest.fixture(scope="module")
def configs(tokenizer: str) -> dict[str, Any]:
    recipes = {recipe: compose(recipe, [tokenizer]) for recipe, _ in CASES.values()}
    return {name: override(recipes[CASES[name][0]], CASES[name][1]) for name in PLANNED}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a tokenizer of ``TOKENS`` tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(WordLevel({str(number): number for number in range(TOKENS)}, "0")).save(str(folder / "tokenizer.json"))
    return f"data.tokenizer={folder}"


@pytest.fixture(scope="module")
def measured(configs: dict[str, Any]) -> dict[str, Any]:
    return in_child(_measure_all, (configs,))


def _measure_all(configs: dict[str, Any]) -> dict[str, Any]:
    return {name: ranks_of(config, TOKENS) for name, config in configs.items()}


@pytest.mark.parametrize("case", PLANNED)
def test_every_parameter_of_every_rank_is_megatrons(
    case: str, configs: dict[str, Any], measured: dict[str, Any]
) -> None:
    setting = setting_of(configs[case])
    for (stage, _, _), found in measured[case].items():
        planned = [(parameter.name, parameter.size) for parameter in stage_parameters(setting, stage)]
        assert planned == found["sizes"]


@pytest.mark.parametrize("case", PLANNED)
def test_bytes_of_weights_gradients_and_optimizer_are_megatrons(
    case: str, configs: dict[str, Any], measured: dict[str, Any]
) -> None:
    setting = setting_of(configs[case])
    for stage in range(setting.pipeline):
        ranks = [found for (of_stage, _, _), found in measured[case].items() if of_stage == stage]
        assert len(ranks) == setting.shards + (setting.tensor > 1)
        planned = stage_states(setting, stage)
        assert {found["weights"] for found in ranks} == {planned.weights}
        assert {found["gradients"] for found in ranks} == {planned.gradients}
        assert max(found["optimizer"] for found in ranks) == planned.optimizer
