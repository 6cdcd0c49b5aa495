"""Every key of a recipe is either read by the plan, which then changes with it, or cannot matter to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_rao.config.compose import compose, override
from nemo_rao.config.run_config import RunConfig
from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.plan_data import DataSize, run_length
from nemo_rao.planning.report import record

from ..engines import needs_nemo

MACHINE = Machine("H100", 80.0, 4.0, 989.4, 0.5, 450.0, 50.0, 0.8, 3350.0, 8)
SIZES = (
    *("model.arch.num_layers=8", "model.arch.hidden_size=256", "model.arch.ffn_hidden_size=512"),
    *("model.arch.num_attention_heads=8", "model.arch.num_query_groups=4", "model.arch.kv_channels=32"),
    *("model.arch.extra={vocab_size: 1024}", "trainer.devices=4", "model.seq_length=256"),
    *("precision.params=bf16", "model.micro_batch_size=1", "data.num_responses=4"),
    *("model.optim.overlap_grad_reduce=true", "data.validation_path=validation.jsonl"),
)
TENSOR = ("model.tensor_model_parallel_size=2",)
FULL = ("model.recompute_granularity=full",)
LORA = ("model.peft.scheme=lora",)
MIXTURE = ("model.family=mixtral", "model.arch.extra={vocab_size: 1024, num_moe_experts: 4}")
TOKENIZED = ("model.arch.extra={vocab_size: null}",)
SAMPLED = ("online.num_generations=4", "online.max_new_tokens=128")
DATA = ("data.train_path=train.jsonl",)
# FP8 recipe -> keys that go with another one.
EIGHT_BITS = {
    "delayed": ("first_last", "num_layers_at", "fp8_param"),
    "tensorwise": ("fp8_wgrad", "fp8_amax", "fp8_margin", "fp8_simulation"),
}

# Key -> what it is set to, after what else has to be set for it to matter.
READ: dict[str, tuple[str, tuple[str, ...]]] = {
    "trainer.accelerator": ("cpu", ()),
    "trainer.devices": ("8", ()),
    "trainer.num_nodes": ("2", ()),
    "trainer.max_steps": ("7", ()),
    "trainer.max_epochs": ("5", DATA),
    "trainer.val_check_interval": ("3", DATA),
    "model.objective": ("dpo", ()),
    "model.family": ("qwen2", ()),
    "model.config_class": ("Qwen2Config", ()),
    "model.arch.num_layers": ("4", ()),
    "model.arch.hidden_size": ("512", ()),
    "model.arch.ffn_hidden_size": ("1024", ()),
    "model.arch.num_attention_heads": ("16", ()),
    "model.arch.num_query_groups": ("8", ()),
    "model.arch.kv_channels": ("64", ()),
    "model.arch.share_embeddings_and_output_weights": ("true", ()),
    "model.arch.make_vocab_size_divisible_by": ("4096", TOKENIZED),
    "model.arch.hidden_dropout": ("0.1", ()),
    "model.arch.extra": ("{vocab_size: 1024, qk_layernorm: true}", ()),
    "model.fused_log_probs": ("false", ()),
    "model.seq_length": ("512", ()),
    "model.micro_batch_size": ("2", ()),
    "model.global_batch_size": ("16", ()),
    "model.tensor_model_parallel_size": ("2", ()),
    "model.pipeline_model_parallel_size": ("2", ()),
    "model.virtual_pipeline_model_parallel_size": ("2", ("model.pipeline_model_parallel_size=2",)),
    "model.context_parallel_size": ("2", ()),
    "model.expert_model_parallel_size": ("2", MIXTURE),
    "model.expert_tensor_parallel_size": ("1", (*MIXTURE, *TENSOR, "model.sequence_parallel=true")),
    "model.sequence_parallel": ("true", TENSOR),
    "model.recompute_granularity": ("full", ()),
    "model.recompute_method": ("block", FULL),
    "model.recompute_num_layers": ("2", FULL),
    "model.peft.scheme": ("lora", ()),
    "model.peft.lora.dim": ("64", LORA),
    "model.peft.lora.dropout": ("0.1", LORA),
    "model.peft.lora.target_modules": ("[linear_qkv]", LORA),
    "model.optim.use_distributed_optimizer": ("false", ()),
    "model.optim.overlap_grad_reduce": ("false", ()),
    "model.optim.overlap_param_gather": ("true", ()),
    "model.optim.cpu_offload_fraction": ("0.5", ()),
    "data.train_path": ("train.jsonl", ()),
    "data.validation_path": ("null", DATA),
    "data.tokenizer": ("TOKENIZER", TOKENIZED),
    "data.num_prompts": ("40", DATA),
    "data.num_responses": ("8", ()),
    "online.num_generations": ("8", ()),
    "online.max_new_tokens": ("64", SAMPLED),
    "online.top_p": ("0.9", SAMPLED),
    "online.rows_at_once": ("4", SAMPLED),
    "online.mini_batches": ("2", SAMPLED),
    "online.sampler": ("vllm", SAMPLED),
    "online.epochs": ("2", (*DATA, *SAMPLED, "trainer.max_epochs=1")),
    "data.responses": ("best_random", ()),
    "data.pad_to_multiple_of": ("96", ()),
    "data.packing": ("true", ("data.pad_to_multiple_of=96",)),
    "precision.params": ("fp32", ()),
    "precision.grad_reduce_in_fp32": ("false", ()),
    "precision.fp8": ("hybrid", ("model.context_parallel_size=2", "--tokens-per-row")),
    "precision.fp8_recipe": ("mxfp8", ("precision.fp8=hybrid", "--tokens-per-row")),
    "reference.micro_batch_size": ("64", ()),
    "reference.save_every": ("1", ("model.pipeline_model_parallel_size=2", *DATA)),
}

# Key, or group of keys -> why it cannot matter, and a value that is not the default.
CANNOT: dict[str, tuple[str, str]] = {
    "trainer.engine": ("both build the same network and optimizer", "bridge"),
    "trainer.log_every_n_steps": ("a few numbers", "7"),
    "trainer.gradient_clip_val": ("a norm that is computed in any case", "0"),
    "trainer.seed": ("which numbers are drawn, not how many", "7"),
    "trainer.enable_progress_bar": ("printing", "false"),
    "trainer.timeout_minutes": ("how long a rank waits in an error", "7"),
    "trainer.threads_per_rank": ("of a CPU, whose time is not planned", "2"),
    "trainer.profile_steps": ("a few steps", "[3,4]"),
    "exp_manager.exp_dir": ("where results go", "elsewhere"),
    "exp_manager.name": ("where results go", "other"),
    "exp_manager.resume_if_exists": ("the whole run is planned", "false"),
    "exp_manager.resume_with_changes": ("the whole run is planned", "true"),
    "exp_manager.create_tensorboard_logger": ("always true", "true"),
    "exp_manager.draw_curves": ("after the run", "false"),
    "exp_manager.create_wandb_logger": ("a few numbers", "true"),
    "exp_manager.wandb_logger_kwargs.project": ("a name", "other"),
    "exp_manager.wandb_logger_kwargs.name": ("a name", "other"),
    "exp_manager.checkpoint_callback_params.monitor": ("checkpoints are not counted", "val/loss"),
    "exp_manager.checkpoint_callback_params.mode": ("checkpoints are not counted", "max"),
    "exp_manager.checkpoint_callback_params.save_top_k": ("checkpoints are not counted", "0"),
    "exp_manager.checkpoint_callback_params.save_last": ("checkpoints are not counted", "false"),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": ("checkpoints are not counted", "7"),
    "exp_manager.checkpoint_callback_params.async_save": ("checkpoints are not counted", "true"),
    "model.cpu_offloading_num_layers": ("what Transformer Engine moves when is not known; the command says so", "2"),
    "model.arch.rotary_base": ("a number in a formula", "7"),
    "model.arch.rope_scaling.factor": ("a number in a formula", "7"),
    "model.arch.rope_scaling.low_freq_factor": ("a number in a formula", "7"),
    "model.arch.rope_scaling.high_freq_factor": ("a number in a formula", "7"),
    "model.arch.rope_scaling.original_max_position_embeddings": ("a number in a formula", "7"),
    "model.arch.attention_dropout": ("fused attention draws it anew in its backward pass", "0.1"),
    "model.restore_from_path": ("weights of the same shapes", "elsewhere"),
    "model.allow_pickle": ("how they are read", "true"),
    "model.allow_random_weights": ("what is refused", "true"),
    "model.peft.lora.alpha": ("a factor", "7"),
    "model.optim.name": ("there is one", "adam"),
    "model.optim.lr": ("a number in a formula", "7e-7"),
    "model.optim.weight_decay": ("a number in a formula", "0.7"),
    "model.optim.betas": ("numbers in a formula", "[0.7,0.7]"),
    "model.optim.eps": ("a number in a formula", "7e-7"),
    "model.optim.sched.name": ("the learning rate", "constant"),
    "model.optim.sched.warmup_steps": ("the learning rate", "7"),
    "model.optim.sched.constant_steps": ("the learning rate", "7"),
    "model.optim.sched.min_lr": ("the learning rate", "1e-9"),
    "data.pairs_by": ("which responses are compared", "reward"),
    "data.chat_template": ("tokens of rows, which --tokens-per-row gives", "never"),
    "data.template_arguments": ("tokens of rows, which --tokens-per-row gives", "{enable_thinking: false}"),
    "data.reward_field": ("numbers beside the tokens", "score"),
    "data.columns": ("names of fields in files that are read elsewhere", "{prompt: question}"),
    "data.ignore_fields": ("fields that nothing reads", "[source]"),
    "data.answers": ("tokens of rows, which --tokens-per-row gives", "verbatim"),
    "data.truncated": ("rows that are dropped are not known before they are tokenized", "without_end"),
    "data.bad_rows": ("rows that are dropped are not known before they are tokenized", "drop"),
    "data.max_bad_rows": ("what is refused", "0.5"),
    "data.strict": ("rows that are dropped are not known before they are tokenized", "true"),
    "data.cache": ("reading data is not counted", "false"),
    "data.cache_dir": ("reading data is not counted", "elsewhere"),
    "data.shuffle": ("order", "false"),
    "data.seed": ("order", "7"),
    "data.prefix_sharing": ("how long prompts are is not known; the command says so", "true"),
    "precision.fp8_amax_history_len": ("8 bits are planned as bf16", "7"),
    "precision.fp8_amax_compute_algo": ("8 bits are planned as bf16", "most_recent"),
    "precision.fp8_margin": ("8 bits are planned as bf16", "7"),
    "precision.fp8_wgrad": ("8 bits are planned as bf16", "false"),
    "precision.fp8_param_gather": ("8 bits are planned as bf16", "true"),
    "precision.first_last_layers_bf16": ("8 bits are planned as bf16", "true"),
    "precision.num_layers_at_start_in_bf16": ("8 bits are planned as bf16", "2"),
    "precision.num_layers_at_end_in_bf16": ("8 bits are planned as bf16", "2"),
    "precision.fp8_simulation": ("8 bits are planned as bf16", "true"),
    "precision.fp16_loss_scale": ("a factor", "7"),
    "precision.fp16_initial_loss_scale": ("a factor", "7"),
    "precision.fp16_min_loss_scale": ("a factor", "7"),
    "precision.fp16_loss_scale_window": ("a factor", "7"),
    "precision.fp16_hysteresis": ("a factor", "7"),
    "reference.cache_dir": ("where sums are kept", "elsewhere"),
    "online.temperature": ("which tokens are drawn, not how many", "0.5"),
    "online.top_k": ("which tokens are drawn, not how many", "7"),
    "online.seed": ("which tokens are drawn, not how many", "7"),
    "online.reward": ("time of scorers is not known", "[rule:a:b]"),
    "online.reward_weights": ("a factor", "{a: 2}"),
    "online.cut_responses": ("numbers beside the tokens", "drop"),
    "online.cut_reward": ("a number", "7"),
    "online.scoring_attempts": ("what happens after an error", "7"),
    "online.validation_generations": ("validations by sampling are not planned", "7"),
    "online.log_samples_every": ("a few rows", "7"),
    "online.log_samples": ("a few rows", "7"),
    "online.vllm_python": ("what vLLM takes is not planned", "python"),
    "online.vllm_importance_cap": ("scales the tokens' losses", "2.0"),
    "online.vllm_gpus": ("what vLLM takes is not planned", "[1]"),
    "online.vllm_memory": ("what vLLM takes is not planned", "0.5"),
}

# What an objective's own keys change of a plan, they change through what the objective needs
# (test_plan_responses.py).
OBJECTIVE_KEYS = tuple(f"model.{name}." for name in OBJECTIVES)


def keys_of(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return compose("gpt_rao", SIZES)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Number of tokens -> folder of a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    found = {}
    for number in (900, 2900):
        folder = tmp_path_factory.mktemp("tokenizer")
        words = {str(word): word for word in range(number)}
        Tokenizer(WordLevel(words, "0")).save(str(folder / "tokenizer.json"))
        found[number] = str(folder)
    return found


def planned(config: RunConfig, tokens_per_row: int | None = None) -> str:
    """All figures. Data sizes stand for files: the key of training data decides whether there is one."""
    training = None if config.data.train_path is None else DataSize(prompts=80, responses=4)
    setting = setting_of(config, tokens_per_row=tokens_per_row)
    length = run_length(config, training=training, validation=DataSize(10, 4))
    made = record("", setting, MACHINE, [], length)
    # What it takes, not what it was asked for: a key that is only copied is not read.
    made.pop("setting")
    return json.dumps(made, sort_keys=True)


def test_the_plan_decides_on_every_key_of_a_recipe(config: RunConfig) -> None:
    keys = {key for key in keys_of(config) if not key.startswith(OBJECTIVE_KEYS)}
    assert not READ.keys() & CANNOT.keys()
    assert READ.keys() | CANNOT.keys() == keys


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=needs_nemo) if key == "model.config_class" else key for key in READ]
)
def test_a_key_that_is_read_changes_the_plan(key: str, config: RunConfig, tokenizers: dict[int, str]) -> None:
    value, context = READ[key]
    tokens = 100 if "--tokens-per-row" in context else None
    before = [*(text for text in context if not text.startswith("--")), f"data.tokenizer={tokenizers[900]}"]
    value = tokenizers[2900] if value == "TOKENIZER" else value
    without = override(config, before)
    assert planned(override(without, [f"{key}={value}"]), tokens) != planned(without, tokens)


@pytest.mark.parametrize("recipe", EIGHT_BITS)
def test_keys_that_cannot_matter_leave_the_plan_as_it_is(recipe: str, config: RunConfig) -> None:
    before = override(config, ["precision.fp8=hybrid", f"precision.fp8_recipe={recipe}", *DATA])
    without = tuple(f"precision.{name}" for name in EIGHT_BITS[recipe])
    changed = {key: value for key, (_, value) in CANNOT.items() if not key.startswith(without)}
    after = override(before, [f"{key}={value}" for key, value in changed.items()])
    assert planned(after) == planned(before)
    values = [_value(after, key) != _value(before, key) for key in changed]
    assert values.count(False) == 2  # of two keys there is only one value


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
