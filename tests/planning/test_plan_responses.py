"""What is planned is what a run computes: its responses, its logits, its sequences, its reference pass."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_rao.config.compose import compose, override
from nemo_rao.config.derived import chosen_responses
from nemo_rao.config.precision_checks import sequence_multiple
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.choice import num_used
from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.planning.communication import communication
from nemo_rao.planning.compute import flops
from nemo_rao.planning.log_probs import log_prob_bytes, whole_logits
from nemo_rao.planning.memory import memory, peak
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting

OUTPUT = ("model.peft.scheme=lora", "model.peft.lora.target_modules=[linear_qkv,output_layer]")


@pytest.fixture(scope="module")
def llama() -> RunConfig:
    return compose("gpt_rao_llama3_8b", ["data.num_responses=null"])


def setting(config: RunConfig, *overrides: str, responses: int | None = None) -> Setting:
    return setting_of(override(config, overrides), responses=responses)


# ----------------------------------------------------------------------------------------------------- responses


@pytest.mark.parametrize(("number", "which", "used"), [(16, "all", 16), (16, "best_worst", 2), (1, "best_random", 1)])
def test_of_the_responses_that_a_prompt_has_some_are_used(number: int, which: str, used: int) -> None:
    assert num_used(number, which) == used  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_of_pairs_are_planned_with_two_responses(objective: str, llama: RunConfig) -> None:
    """Whatever ``data.num_responses`` says, the best and the worst of them are computed, unless ``data.responses``."""
    pairs = OBJECTIVES[objective].needs_of(OBJECTIVES[objective].make_config({})).pairs

    def planned(which: str | None) -> RunConfig:
        data = dataclasses.replace(llama.data, num_responses=16, responses=which)
        return dataclasses.replace(llama, data=data, model=dataclasses.replace(llama.model, objective=objective))

    assert chosen_responses(planned(None)) == ("best_worst" if pairs else "all")
    numbers = [setting_of(planned(which)).responses for which in (None, "all", "best_random")]
    assert numbers == [2 if pairs else 16, 16, 2]


@pytest.mark.parametrize(
    ("key", "given", "planned"),
    [("null", None, 2), ("null", 6, 6), ("4", None, 4), ("4", 6, 4), ("4", 3, 3)],
)
def test_a_run_uses_the_first_responses_of_those_in_the_data(
    key: str, given: int | None, planned: int, llama: RunConfig
) -> None:
    assert setting(llama, f"data.num_responses={key}", responses=given).responses == planned


def test_pairs_of_many_responses_take_what_pairs_take() -> None:
    dpo = compose("gpt_dpo", ["model=llama3_8b", "precision=bf16_mixed", "paper=rao_2026_baselines"])
    assert setting(dpo, "data.num_responses=16") == setting(dpo) == setting(dpo, responses=16)


# -------------------------------------------------------------------------------------------------- output layer


def test_an_adapter_on_the_output_layer_is_planned_with_logits(llama: RunConfig) -> None:
    adapted = setting(llama, *OUTPUT)
    plain = setting(llama, OUTPUT[0], "model.peft.lora.target_modules=[linear_qkv]")
    assert adapted.holds_logits and adapted.fused_log_probs and not plain.holds_logits
    # The layer's logits, the adapter's, and their sum or its gradient.
    assert log_prob_bytes(adapted) > 3 * whole_logits(adapted) > 0
    # Nothing is left out, so nothing is computed again; the adapter is computed too.
    tokens, network = adapted.step_tokens, adapted.network
    output = 2 * network.hidden * network.tokens * tokens
    adapter = 2 * adapted.lora_offered.dim * (network.hidden + network.tokens) * tokens  # type: ignore[union-attr]
    assert flops(adapted).forward - flops(plain).forward == adapter
    assert flops(adapted).executed - flops(plain).executed == 3 * adapter - output


@pytest.mark.parametrize("target", ["'*output_layer'", "output_layer", "'out*'"])
def test_the_output_layer_is_matched_as_nemo_matches(target: str, llama: RunConfig) -> None:
    assert setting(llama, OUTPUT[0], f"model.peft.lora.target_modules=[{target}]").holds_logits


def test_a_reward_model_holds_no_logits(llama: RunConfig) -> None:
    reward = setting(llama, "model.objective=rm", "model.fused_log_probs=false")
    assert not reward.holds_logits and setting(llama, "model.fused_log_probs=false").holds_logits
    last = dataclasses.replace(reward, scores=0)
    assert communication(reward).tensor < communication(last).tensor  # nor does it gather its hidden states for them


# ----------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.pad_to_multiple_of=96",),
        ("model.context_parallel_size=2", "data.pad_to_multiple_of=24"),
        ("precision.fp8=hybrid", "precision.fp8_recipe=mxfp8", "model.seq_length=4096"),
    ],
)
def test_rows_are_padded_as_in_a_run(overrides: tuple[str, ...], llama: RunConfig) -> None:
    config = override(llama, overrides)
    multiple = sequence_multiple(config) * config.data.pad_to_multiple_of
    planned = setting_of(config, tokens_per_row=1001)
    assert planned.length >= 1001 and planned.length % sequence_multiple(config) == 0
    assert planned.length % config.data.pad_to_multiple_of == 0 and planned.length < 1001 + multiple
    assert planned.micro_batch_tokens == planned.rows * planned.length // planned.context


def test_packed_rows_are_padded_once(llama: RunConfig) -> None:
    asked = override(llama, ["data.pad_to_multiple_of=512", "model.micro_batch_size=4"])
    rows = setting_of(asked, tokens_per_row=600)
    packed = setting_of(override(asked, ["data.packing=true"]), tokens_per_row=600)
    assert (rows.micro_batch_tokens, packed.micro_batch_tokens) == (8 * 1024, 5120)  # 8 x 600 is 4800
    assert packed.step_tokens == 5120 * packed.num_micro_batches * packed.data
    assert flops(packed).model < flops(rows).model


# ------------------------------------------------------------------------------------------------ reference pass


def test_large_micro_batches_of_the_reference_pass_may_be_what_takes_most(llama: RunConfig) -> None:
    before = setting(llama)
    large = setting(llama, "reference.micro_batch_size=256")
    stage = memory(large)[0]
    assert stage.reference == stage.passing > memory(before)[0].passing
    # Of 512 rows: the residual stream, a part of it on each rank; its gathered copy; both sides of the activation.
    tokens, network = 512 * large.length, large.network
    stream = tokens * network.hidden * 2
    assert stage.reference == stream // 4 + stream + tokens * 3 * network.ffn // 4 * 2
    assert peak(setting(llama, "reference.micro_batch_size=256", "model.objective=simpo")) == peak(
        setting(llama, "model.objective=simpo")  # which has no reference
    )


def test_adapters_of_some_layers_are_counted_there(llama: RunConfig) -> None:
    def planned(targets: str) -> int:
        asked = setting(llama, "model.peft.scheme=lora", f"model.peft.lora.target_modules=[{targets}]")
        return flops(asked).forward - flops(dataclasses.replace(asked, lora=None)).forward

    assert planned("'*.layers.7.self*.linear_qkv'") * 32 == planned("linear_qkv") > 0
