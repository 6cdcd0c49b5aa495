"""Rules that tie several keys, files and ranks together, found before anything heavy is imported."""

from pathlib import Path

import pytest

from nemo_rao.config.checks import check_architecture, check_keys_are_read
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import data_parallel_size
from nemo_rao.config.monitor import check_monitor
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.training.checks import check_run

TP2_PP2 = (
    "trainer.devices=4",
    "model.tensor_model_parallel_size=2",
    "model.pipeline_model_parallel_size=2",
)

ONE_EACH = ("model.micro_batch_size=1", "model.global_batch_size=16")
TP2_EXPERTS = (
    *("model.family=mixtral", "trainer.devices=2", "model.tensor_model_parallel_size=2"),
    *("model.sequence_parallel=true", "model.arch.ffn_hidden_size=385"),
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides for the files that a run needs."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "tokenizer").mkdir()
    return [f"data.train_path={tmp_path}/train.jsonl", f"data.tokenizer={tmp_path}/tokenizer"]


def composed(*overrides: str) -> RunConfig:
    return compose("gpt_rao", overrides)


def test_the_shipped_recipes_pass_with_the_users_files(files: list[str]) -> None:
    for name in ("gpt_rao", "gpt_dpo", "gpt_sft"):
        check_run(compose(name, files))
    check_run(composed(*files, *TP2_PP2))
    large = ("model=llama3_8b", "precision=bf16_mixed", "trainer.accelerator=gpu")
    check_run(composed(*files, *large, "model.allow_random_weights=true"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.objective=kot",), ("model.objective=kot", "did you mean kto?")),
        (("trainer.max_epochs=null",), ("trainer.max_steps", "trainer.max_epochs")),
        (("trainer.max_steps=5", "model.optim.sched.warmup_steps=9"), ("warmup_steps=9", "trainer.max_steps=5")),
        (("exp_manager.checkpoint_callback_params.save_top_k=3",), ("save_top_k=3", "monitor")),
        (("exp_manager.checkpoint_callback_params.monitor=rewards/margin",), ("did you mean rewards/margins?",)),
        (("exp_manager.checkpoint_callback_params.monitor=val/loss",), ("monitor=val/loss", "data.validation_path")),
        (("trainer.devices=3", "model.tensor_model_parallel_size=2"), ("trainer.devices=3", "2 x 1 x 1")),
        (("model.pipeline_model_parallel_size=2",), ("1 ranks", "1 x 2 x 1")),
        (
            ("trainer.devices=3", "model.tensor_model_parallel_size=3"),
            ("num_attention_heads=4", "tensor_model_parallel_size=3"),
        ),
        (
            ("trainer.devices=4", "model.tensor_model_parallel_size=4"),
            ("num_query_groups=2", "tensor_model_parallel_size=4"),
        ),
        (
            ("trainer.devices=3", "model.pipeline_model_parallel_size=3", "model.global_batch_size=6"),
            ("num_layers=4", "pipeline_model_parallel_size=3"),
        ),
        (
            ("model.virtual_pipeline_model_parallel_size=2",),
            ("virtual_pipeline_model_parallel_size=2", "null"),
        ),
        (
            (*TP2_PP2, "model.arch.num_layers=6", "model.virtual_pipeline_model_parallel_size=2"),
            ("num_layers=6", "virtual_pipeline_model_parallel_size=2"),
        ),
        (
            (*TP2_PP2, "model.virtual_pipeline_model_parallel_size=2", "model.micro_batch_size=8"),
            ("global_batch_size=8 gives 1 micro-batches", "pipeline_model_parallel_size=2"),
        ),
        (("model.arch.num_query_groups=3",), ("num_attention_heads=4", "num_query_groups=3")),
        (("model.arch.hidden_size=130",), ("hidden_size=130", "num_attention_heads=4")),
        (
            (*TP2_PP2, "model.arch.ffn_hidden_size=385"),
            ("ffn_hidden_size=385", "tensor_model_parallel_size=2"),
        ),
        (
            ("trainer.devices=2", "model.context_parallel_size=2", "model.seq_length=1022"),
            ("model.seq_length=1022", "set it to 1024"),
        ),
        (("model.sequence_parallel=true",), ("model.sequence_parallel", "tensor_model_parallel_size")),
        ((*TP2_PP2, "model.sequence_parallel=true", "model.seq_length=1023"), ("seq_length=1023", "1024")),
        (("model.global_batch_size=9",), ("global_batch_size=9", "micro_batch_size=2 x 1")),
        (("trainer.devices=3",), ("global_batch_size=8", "3 data-parallel ranks")),
        (("model.optim.betas=[0.9]",), ("model.optim.betas",)),
        (("model.optim.sched.min_lr=1",), ("min_lr=1", "model.optim.lr=0.0005")),
        (("model.optim.overlap_param_gather=true",), ("overlap_grad_reduce",)),
        (("model.recompute_num_layers=2",), ("recompute_num_layers=2", "recompute_granularity=full")),
        (("model.restore_from_path=/nope",), ("model.restore_from_path=/nope", "no such directory")),
        (("data.train_path=null",), ("data.train_path is not set",)),
        (("data.train_path=/nope.jsonl",), ("data.train_path", "/nope.jsonl", "no such file")),
        (("data.train_path=[]",), ("data.train_path", "a list of paths")),
        (("model.arch.num_layers=null",), ("model.arch.num_layers is null", "model.family=llama", "model=llama3_8b")),
        (
            ("model.family=qwen2", "model.arch.rope_scaling.factor=8"),
            (
                "model.arch.rope_scaling.factor=8.0: model.family=qwen2 does not support RoPE scaling",
                "supported by llama",
            ),
        ),
        (
            ("model.family=mixtral", "model.expert_model_parallel_size=16", "trainer.devices=16", *ONE_EACH),
            ("num_moe_experts=8 (of model.family=mixtral)", "model.expert_model_parallel_size=16"),
        ),
        (
            (*TP2_EXPERTS, "model.expert_tensor_parallel_size=2"),
            ("experts' width, 385 (of model.family=mixtral)", "by model.expert_tensor_parallel_size=2;"),
        ),
        (TP2_EXPERTS, ("experts' width, 385 (of model.family=mixtral)", "by model.tensor_model_parallel_size=2;")),
        (("model.expert_model_parallel_size=2", "trainer.devices=2"), ("model.family=llama has no experts",)),
        (("data.train_path=3",), ("data.train_path", "3")),
        (("data.train_path=/nope*.jsonl",), ("data.train_path", "no file matches")),
        (("data.validation_path=/nope.jsonl",), ("data.validation_path", "no such file")),
        (("data.tokenizer=null",), ("data.tokenizer is not set",)),
        (("data.tokenizer=/nope",), ("data.tokenizer=/nope", "no such directory")),
        (("exp_manager.name=a/b",), ("exp_manager.name=a/b", "exp_dir")),
        (("exp_manager.name=",), ("exp_manager.name",)),
    ],
)
def test_keys_that_do_not_fit_together_are_refused_in_one_line(
    overrides: tuple[str, ...], parts: tuple[str, ...], files: list[str]
) -> None:
    config = composed(*files, *overrides)
    with pytest.raises(UserError) as caught:
        check_run(config)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_a_size_says_where_it_comes_from(files: list[str]) -> None:
    config = composed(*files, "trainer.devices=3", "model.tensor_model_parallel_size=3")
    config.model.arch.num_attention_heads = None
    with pytest.raises(UserError, match=r"num_attention_heads=32 \(of model.family=llama\)"):
        check_architecture(config, num_layers=32, num_attention_heads=32, num_query_groups=8)


def test_uneven_pipeline_stages_are_left_to_megatron(files: list[str]) -> None:
    check_run(
        composed(*files, *TP2_PP2, "model.arch.num_layers=5", "model.arch.extra.num_layers_in_first_pipeline_stage=2")
    )


def test_several_files_and_names_of_data_sets_are_taken(files: list[str], tmp_path: Path) -> None:
    train = f"{tmp_path}/train.jsonl"
    check_run(composed(*files, f"data.train_path=[{train},{tmp_path}/*.jsonl]", "data.validation_path=hf:org/name"))


def test_data_parallel_ranks_are_what_the_model_leaves() -> None:
    assert data_parallel_size(composed(*TP2_PP2)) == 1
    assert data_parallel_size(composed("trainer.devices=4", "trainer.num_nodes=2")) == 8


def test_any_metric_of_an_objective_may_rank_checkpoints_and_no_other(files: list[str]) -> None:
    config = composed(*files, f"data.validation_path={files[0].partition('=')[2]}")
    keep = config.exp_manager.checkpoint_callback_params
    for objective in OBJECTIVES:
        config.model.objective = objective
        shared = "logps/chosen" if objective in ("sft", "grpo", "ppo") else "rewards/accuracies"
        for keep.monitor in ("loss", "grad_norm", "lr", "val/loss", shared, f"val/{shared}"):
            check_monitor(config)
        for keep.monitor in ("reduced_train_loss", "val/grad_norm", f"{shared}s", "wer"):
            said = f"monitor={keep.monitor}: a run with objective {objective} reports no such metric; "
            with pytest.raises(UserError, match=said):
                check_monitor(config)


def test_metrics_of_samples_and_of_a_critic_may_rank_checkpoints_where_every_step_reports_them(
    files: list[str],
) -> None:
    validated = (f"data.validation_path={files[0].partition('=')[2]}", "online.reward=[rule:a:b,rule:a:c]")
    own = ("model.ppo.critic=model", "model.restore_from_path=/checkpoints/base", "online.epochs=1")
    config = compose("gpt_ppo", [*files, *validated, *own])
    keep = config.exp_manager.checkpoint_callback_params
    of_critic = ("ppo/value_loss", "ppo/critic_grad_norm", "seconds/critic")
    for keep.monitor in (*of_critic, "rollout/reward", "rollout/kl", "val/reward", "val/kl", "val/scores/b"):
        check_monitor(config)
    config.online.mini_batches = 2
    config.online.reward = ["rule:a:b"]
    for keep.monitor in ("rollout/reward", "val/ppo/value_loss", "val/scores/b"):
        with pytest.raises(UserError, match="reports no such metric"):
            check_monitor(config)


def test_overrides_that_the_objective_does_not_read_are_refused() -> None:
    config = composed("model.dpo.beta=0.3")
    with pytest.raises(UserError, match=r"model.dpo.beta=0.3: model.objective=rao does not read model.dpo.beta"):
        check_keys_are_read(["model.dpo.beta=0.3"], config)
    check_keys_are_read(["model.rao.beta=0.3", "model.optim.lr=1e-6"], config)
