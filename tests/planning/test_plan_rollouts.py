"""What a plan counts of rollouts: against sums by hand."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_rao.config.compose import compose
from nemo_rao.planning.machine import Machine
from nemo_rao.planning.memory import stage_memory
from nemo_rao.planning.parameters import model_parameters
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.report import record, table
from nemo_rao.planning.rollouts import cache_bytes, rollout_time, sampling_bytes
from nemo_rao.planning.setting import Setting
from nemo_rao.planning.step_time import forward_seconds, step_time
from nemo_rao.planning.whole_run import RunLength, run_time

# 1e12 FLOPs a second, links that take no time, and 1e12 bytes a second of memory.
MACHINE = Machine("a GPU", 80.0, 4.0, 2.0, 0.5, 1e9, 1e9, 1.0, 1250.0, 8)
LAYERS, HIDDEN, FFN, GROUPED, VOCAB = 32, 4096, 14336, 1024, 128256
PROMPT, NEW, K, ROWS = 1024, 1024, 4, 128
LINEAR = 2 * HIDDEN * (2 * HIDDEN + 2 * GROUPED + 3 * FFN)  # FLOPs a token of a layer


@pytest.fixture(scope="module")
def alone() -> Setting:
    """64 prompts of 1,024 tokens on one GPU, four responses each."""
    overrides = ("trainer.devices=1", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")
    return setting_of(compose("gpt_rloo_llama3_8b", overrides))


def test_keys_and_values_of_all_rows_or_the_logits_with_them(alone: Setting) -> None:
    cache = 2 * 2 * LAYERS * GROUPED * ROWS * (PROMPT + NEW)
    assert cache_bytes(alone, 0) == cache
    # While a token is drawn, a logit in bf16, in fp32 and scaled, its probability and the sum up to it.
    assert sampling_bytes(alone, 0) == cache + ROWS * VOCAB * (2 + 4 + 4 + 8 + 8)
    split = dataclasses.replace(alone, devices=8, tensor=4, pipeline=2)
    assert cache_bytes(split, 1) == cache // 8 == sampling_bytes(split, 0)
    # Not more rows than there are.
    few = dataclasses.replace(alone, global_batch_size=8)
    assert cache_bytes(few, 0) == cache // 4
    many = dataclasses.replace(alone, tokens_per_row=8 * (PROMPT + NEW), recompute_granularity="full")
    assert stage_memory(many, 0).passing == sampling_bytes(many, 0) > cache


def test_reference_weights_wait_in_host_memory_but_for_adapters(alone: Setting) -> None:
    assert stage_memory(alone, 0).host == 2 * model_parameters(alone)
    assert stage_memory(dataclasses.replace(alone, reference=False), 0).host == 0
    lora = setting_of(compose("gpt_rloo_llama3_8b", ["model.peft.scheme=lora"]))
    assert stage_memory(lora, 0).host == 0 < lora.rollouts.passes  # type: ignore[union-attr]


def test_offloaded_optimizer_states_are_in_host_memory_beside_reference_weights(alone: Setting) -> None:
    offloaded = dataclasses.replace(alone, optimizer_in_host=0.25)
    before, after = stage_memory(alone, 0), stage_memory(offloaded, 0)
    assert after.host - before.host == before.optimizer - after.optimizer == before.optimizer // 4 > 0
    [stage] = record("a run", offloaded, MACHINE, [], None)["memory_bytes"]
    assert (stage["optimizer"], stage["host"], stage["total"]) == (after.optimizer, after.host, after.total)
    shown = f"host memory of a node: at most {after.host / 2**30:.2f} (optimizer states, reference weights)"
    assert shown in table("a run", offloaded, MACHINE, [], None)
    training = dataclasses.replace(offloaded, rollouts=None)
    shown = f"host memory of a node: at most {before.optimizer / 4 / 2**30:.2f} (optimizer states)"
    assert shown in table("a run", training, MACHINE, [], None)


def test_prompts_are_read_once_and_tokens_take_products_or_reads(alone: Setting) -> None:
    time = rollout_time(alone, MACHINE)
    attention = 4 * HIDDEN * PROMPT
    assert time.prompts == pytest.approx(64 * PROMPT * LAYERS * (LINEAR + attention) / 1e12)
    # Of 256 rows, two batches: products take longer than reading 16 GB.
    products = ROWS * (LAYERS * (LINEAR + 4 * HIDDEN) + 2 * HIDDEN * VOCAB) / 1e12
    assert time.tokens == pytest.approx(2 * NEW * products)
    fast = dataclasses.replace(MACHINE, peak_tflops=2000.0)
    weights = 2 * (model_parameters(alone) - HIDDEN * VOCAB)  # the embedding's rows are not all read
    reads = (weights + 0.75 * cache_bytes(alone, 0)) / 1e12
    assert rollout_time(alone, fast).tokens == pytest.approx(2 * NEW * reads)
    assert time.passes == pytest.approx(forward_seconds(alone, MACHINE, prompts=64))


def test_stages_work_one_after_the_other(alone: Setting) -> None:
    one, two = alone, dataclasses.replace(alone, devices=2, pipeline=2)
    for part in ("prompts", "tokens"):
        assert getattr(rollout_time(two, MACHINE), part) == pytest.approx(getattr(rollout_time(one, MACHINE), part))


def test_a_rollout_is_for_all_steps_on_it(alone: Setting) -> None:
    grpo = setting_of(compose("gpt_grpo_llama3_8b", ["online.mini_batches=2", "online.epochs=3"]))
    assert grpo.rollouts is not None and (grpo.rollouts.steps, grpo.rollouts.passes) == (6, 2)
    time = run_time(RunLength(steps=12, prompts=1000, validation_prompts=0, validations=0), grpo, MACHINE)
    assert time.rollouts == pytest.approx(2 * rollout_time(grpo, MACHINE).total)
    assert time.training == pytest.approx(12 * step_time(grpo, MACHINE).total) and time.reference == 0
    assert time.total == pytest.approx(time.rollouts + time.training)


def test_a_critic_counts_with_its_states_beside_the_policys(alone: Setting) -> None:
    overrides = ("trainer.devices=1", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false")
    with_head = setting_of(compose("gpt_ppo_llama3_8b", overrides))
    with_model = setting_of(compose("gpt_ppo_llama3_8b", (*overrides, "model.ppo.critic=model")))
    assert with_head.critic is None and with_model.critic is not None and with_model.rollouts == with_head.rollouts
    before, stage = stage_memory(with_head, 0), stage_memory(with_model, 0)
    # Its output layer is there and is not trained; its value head, which the policy no longer has, is in its place.
    trained = model_parameters(alone) - HIDDEN * VOCAB + HIDDEN + 1
    states = 2 * (trained + HIDDEN * VOCAB) + 4 * trained + 12 * trained
    held = stage.critic - stage_memory(with_model.critic, 0).passing
    assert held == pytest.approx(states, rel=1e-6)  # with the buffers' padding
    assert stage.total == stage.weights + stage.gradients + stage.optimizer + stage.critic > before.total + held // 2
    assert stage.host - before.host == pytest.approx(states - 4 * trained, rel=1e-6)
    on_cpu = stage_memory(dataclasses.replace(with_model, transformer_engine=False), 0)
    assert on_cpu.critic_states == held and on_cpu.host == stage.weights
    length = RunLength(steps=4, prompts=1000, validation_prompts=0, validations=0)
    one, two = (run_time(length, setting, MACHINE) for setting in (with_head, with_model))
    assert two.training - one.training == pytest.approx(4 * step_time(with_model.critic, MACHINE).total, rel=1e-3)
    assert two.rollouts - one.rollouts == pytest.approx(forward_seconds(with_model.critic, MACHINE, prompts=128))
