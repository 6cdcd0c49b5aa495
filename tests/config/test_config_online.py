"""Mistakes in a run that samples its own responses are reported before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rao.config.checks import check_config
from nemo_rao.config.compose import compose
from nemo_rao.errors import UserError
from nemo_rao.training.checks import check_run

VLLM = ("online.sampler=vllm", "online.vllm_python=python")
OVERLAPPED = (
    "model.optim.use_distributed_optimizer=true",
    "model.optim.overlap_grad_reduce=true",
    "model.optim.overlap_param_gather=true",
)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return [
        f"data.train_path={tmp_path}/prompts.jsonl",
        f"data.tokenizer={tmp_path}",
        f"model.restore_from_path={tmp_path}",
        "online.reward=[rule:nemo_rao.demo.synthetic:ground_truth_reward]",
    ]


@pytest.mark.parametrize("recipe", ["gpt_rloo", "gpt_grpo", "gpt_ppo", "gpt_rpo_online", "gpt_rao_online"])
def test_a_recipe_passes(files: list[str], recipe: str) -> None:
    check_config(compose(recipe, files))


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        ("gpt_rloo", ["online.num_generations=null"], "model.objective=rloo trains on samples of its own policy"),
        ("gpt_rloo", ["online.num_generations=1"], "online.num_generations=1: .* needs at least 2"),
        ("gpt_rloo", ["online.max_new_tokens=0"], "online.max_new_tokens=0: must be >= 1"),
        ("gpt_rloo", ["online.max_new_tokens=64", "model.seq_length=64"], "leaves no token of model.seq_length=64"),
        ("gpt_rloo", ["online.temperature=0"], "gives the same response 4 times"),
        ("gpt_rloo", ["online.top_p=0"], "online.top_p=0: leaves no token"),
        (
            "gpt_dpo",
            ["online.reward=[rule:a:b]"],
            "online.reward=.'rule:a:b'.: applies only to samples, but online.num",
        ),
        ("gpt_rloo", ["online.vllm_python=python"], "online.vllm_python=python: has no effect without online.sampler"),
        ("gpt_rloo", ["online.cut_reward=-1"], "online.cut_reward=-1.0: has no effect without online.cut_responses"),
        ("gpt_rloo", ["online.validation_generations=2"], "has no effect without data.validation_path"),
        ("gpt_rloo", ["data.cache_dir=/x"], "data.cache_dir=/x: .* only prompts, which are not cached; leave it out"),
        ("gpt_rloo", ["reference.save_every=7"], "reference.save_every=7: applies only to the reference pass"),
        ("gpt_rloo", ["data.reward_field=score"], "data.reward_field=score: applies only to responses in files"),
        ("gpt_grpo", ["model.grpo.beta=0.1", "model.restore_from_path=null"], "model.restore_from_path is null"),
        ("gpt_ppo", ["model.restore_from_path=null"], "model.restore_from_path is null"),
        ("gpt_rloo", ["model.context_parallel_size=2", "trainer.devices=2"], "sampling does not split sequences"),
        ("gpt_rloo", ["data.answers=verbatim"], "data.answers=verbatim: applies only to responses in files"),
        ("gpt_rloo", ["model.peft.scheme=dora", "trainer.engine=bridge"], "its magnitudes cannot be switched off"),
        ("gpt_rloo", [*OVERLAPPED], "weights that are still being gathered cannot be swapped"),
        ("gpt_rloo", ["online.sampler=vllm"], "online.sampler=vllm: .* set online.vllm_python to its interpreter"),
        ("gpt_rloo", ["online.sampler=sglang"], "online.sampler='sglang': must be one of 'megatron', 'vllm'"),
        ("gpt_rloo", [*VLLM, "model.peft.scheme=canonical_lora", "trainer.engine=bridge"], "set it to lora, or online"),
        ("gpt_rloo", [*VLLM, "online.vllm_gpus=[1,1]"], "names a GPU twice"),
        ("gpt_rloo", [*VLLM, "online.vllm_importance_cap=2"], "rloo does not weight single tokens; .* ppo or grpo"),
        ("gpt_grpo", [*VLLM, "online.vllm_importance_cap=0"], "online.vllm_importance_cap=0"),
        ("gpt_rloo", [*VLLM, "online.vllm_memory=0"], "online.vllm_memory=0"),
        ("gpt_grpo", [*VLLM, *OVERLAPPED], "weights that are still being gathered cannot be sent to vLLM"),
        ("gpt_sft", ["online.num_generations=2"], "objective sft does not learn from rewards of samples"),
        ("gpt_kto", ["online.num_generations=2"], "objective kto does not learn from rewards of samples"),
        ("gpt_rm", ["online.num_generations=2"], "objective rm does not learn from rewards of samples"),
    ],
)
def test_one_line_reports_what_is_wrong(files: list[str], recipe: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        check_run(compose(recipe, [*files, *overrides]), start_exists=False)
    assert "\n" not in str(refused.value)
