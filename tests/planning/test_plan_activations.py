"""Activations and FLOPs against what a small model keeps and computes, on Megatron's layers without logits or with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from nemo_rao.config.compose import compose, override
from nemo_rao.config.run_config import RunConfig
from nemo_rao.planning import activations
from nemo_rao.planning.compute import flops
from nemo_rao.planning.log_probs import whole_logits
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting

from ..megatron_ranks import run_ranks
from ..slow import OnDemand, slow_but
from .small_models import measure

ROWS, LENGTH, TOKENS = 2, 64, 512
# What is planned are megatron-core 0.15's layers, whose gated MLP copies its linear half; 0.14's do not.
CLOSE = 0.1 if Version(version("megatron-core")) >= Version("0.15") else 0.13
SIZES = (
    *("model.arch.num_layers=4", "model.arch.hidden_size=64", "model.arch.ffn_hidden_size=176"),
    *("model.arch.num_attention_heads=4", "model.arch.num_query_groups=2", "model.seq_length=64"),
    *(f"model.arch.extra={{vocab_size: {TOKENS}}}", "model.micro_batch_size=1", "trainer.accelerator=cpu"),
    "trainer.devices=2",
)
SPLIT = ("model.tensor_model_parallel_size=2",)
SEQUENCE = (*SPLIT, "model.sequence_parallel=true")
FULL = ("model.recompute_granularity=full",)
MIXTURE = ("model.family=mixtral", f"model.arch.extra={{vocab_size: {TOKENS}, num_moe_experts: 4}}")
LORA = ("model.peft.scheme=lora", "model.peft.lora.dim=8")
CASES: dict[str, tuple[str, ...]] = {
    "one rank": (),
    "TP 2": SPLIT,
    "TP 2, sequence parallel": SEQUENCE,
    "selective recomputation": ("model.recompute_granularity=selective",),
    "full recomputation": FULL,
    "full recomputation of two layers at a time": (*FULL, "model.recompute_num_layers=2"),
    "full recomputation of three layers": (*FULL, "model.recompute_method=block", "model.recompute_num_layers=3"),
    "TP 2, sequence parallel, full recomputation": (*SEQUENCE, *FULL),
    "bf16": ("precision.params=bf16",),
    "whole logits": ("model.fused_log_probs=false",),
    "Qwen2's biases": ("model.family=qwen2",),
    "experts": MIXTURE,
    "experts, shared": (*MIXTURE, "model.expert_model_parallel_size=2"),
    "experts, full recomputation": (*MIXTURE, *FULL),
    "experts, bf16": (*MIXTURE, "precision.params=bf16"),
    "TP 2, sequence parallel, experts": (*MIXTURE, *SEQUENCE),
    "adapters": LORA,
    "adapters with dropout": (*LORA, "model.peft.lora.dropout=0.1"),
    "TP 2, sequence parallel, adapters with dropout": (*LORA, *SEQUENCE, "model.peft.lora.dropout=0.1"),
    "adapters of two layers by pattern": (
        *LORA,
        "model.peft.lora.target_modules=['*.layers.0.*.linear_*', '*.layers.1.*.linear_*']",
    ),
    "adapters, one on the output layer": (*LORA, "model.peft.lora.target_modules=[linear_qkv,output_layer]"),
}
QUICK = [
    "one rank",
    "full recomputation of two layers at a time",
    "TP 2, sequence parallel, full recomputation",
    "bf16",
    "whole logits",
    "experts, shared",
    "TP 2, sequence parallel, adapters with dropout",
]
FULLY = [case for case in CASES if "full" in case]


@functools.cache
def config(case: str) -> RunConfig:
    return override(small(), CASES[case])


@functools.cache
def small() -> RunConfig:
    return compose("gpt_rao", SIZES)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """By case. The quick cases are measured together, and so are the others."""
    parts = OnDemand(lambda part: measured_on_ranks([case for case in CASES if part_of(case) == part]))
    return OnDemand(lambda case: parts[part_of(case)][case])


def part_of(case: str) -> str:
    return "quick" if case in QUICK else "slow"


def measured_on_ranks(cases: Sequence[str]) -> dict[str, Any]:
    """Of the first rank; FLOPs of both, which experts share unequally."""
    configs = [config(case) for case in cases]
    first, second = run_ranks(measure, (configs, (ROWS, LENGTH), TOKENS), num_ranks=2)
    both = [
        {name: one[name] + two[name] for name in ("forward", "backward")}
        for one, two in zip(first, second, strict=True)
    ]
    return {case: {**one, **sums} for case, one, sums in zip(cases, first, both, strict=True)}


def planned(case: str) -> Setting:
    """One micro-batch a step."""
    setting = setting_of(config(case), responses=ROWS)
    return dataclasses.replace(setting, global_batch_size=setting.data)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_activations_kept_of_a_micro_batch_are_those_measured(case: str, measured: dict[str, Any]) -> None:
    setting = planned(case)
    ours = activations.stored_layers(setting, 0) + activations.stored_ends(setting, 0)
    # What log-probabilities keep beside the workspace: hidden states, and logits where they are whole.
    ours += activations.stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    if setting.holds_logits:
        ours += whole_logits(setting)
    assert ours == pytest.approx(measured[case]["kept"], rel=CLOSE)


@pytest.mark.parametrize("case", slow_but([case for case in QUICK if case in FULLY], FULLY))
def test_recomputed_activations_are_those_measured(case: str, measured: dict[str, Any]) -> None:
    assert activations.recomputed_unit(planned(case), 0) == pytest.approx(measured[case]["again"], rel=CLOSE)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_activations_are_saved_anew_only_where_they_are_recomputed(case: str, measured: dict[str, Any]) -> None:
    assert (measured[case]["again"] > 0) == (planned(case).recompute_granularity is not None)


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_executed_flops_are_those_that_pytorch_counts(case: str, measured: dict[str, Any]) -> None:
    """Both copies of the model compute a micro-batch, or tensor-parallel ranks share one."""
    counted, ours = measured[case], flops(planned(case))
    assert ours.executed == counted["forward"] + counted["backward"]
    if not case.startswith("TP"):
        assert ours.forward == counted["forward"]
