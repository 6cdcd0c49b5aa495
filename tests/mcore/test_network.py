"""What a network computes has a fingerprint: any field that a forward pass depends on, and no way of dividing it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from typing import Any

import pytest
import torch

from ..engines import BRIDGE, ENGINE, NEMO
from ..megatron_ranks import import_once

# What changes the numbers of the same weights.
FORWARD = {
    "rotary_base": 500_000,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "seq_len_interpolation_factor": 2.0,
    "position_embedding_type": "learned_absolute",
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 4,
    "softmax_scale": 0.1,
    "window_size": (8, 0),
    "layernorm_epsilon": 1e-6,
    "layernorm_zero_centered_gamma": True,
    "normalization": "LayerNorm",
    "qk_layernorm": True,
    "share_embeddings_and_output_weights": True,
    "activation_func": torch.nn.functional.gelu,
    "gated_linear_unit": False,
    "apply_residual_connection_post_layernorm": True,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "transformer_layer_spec": import_once,  # any function of another name
}
# How it is divided, what is kept, and in which formats: none of it is another policy.
ELSEWHERE = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "sequence_parallel": True,
    "recompute_granularity": "full",
    "num_layers_in_first_pipeline_stage": 1,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "make_vocab_size_divisible_by": 64,
    "seq_length": 8192,
    "init_method_std": 0.5,
    "bf16": True,
    "params_dtype": torch.bfloat16,
    "fp8": "hybrid",
    "apply_rope_fusion": True,
    "calculate_per_token_loss": True,
    "grad_scale_func": print,
}


# Of the engines: where a layer's usual specs are, and the method that builds a model from its config.
SPECS = {NEMO: "nemo.collections.llm.gpt.model.base", BRIDGE: "megatron.bridge.models.gpt_provider"}
BUILDS = {NEMO: "configure_model", BRIDGE: "provide"}
SIZES = (
    *("model.arch.num_layers=2", "model.arch.hidden_size=48", "model.arch.ffn_hidden_size=96"),
    *("model.arch.num_attention_heads=4", "model.arch.num_query_groups=2"),
)


def network(*overrides: str) -> Any:
    """The engine's config of a recipe's network."""
    import_once()
    from nemo_rao.config.compose import compose
    from nemo_rao.engines.engine import engine_of

    recipe = compose("gpt_rao", (*SIZES, *overrides))
    return engine_of(recipe).model_config(recipe)


@pytest.fixture(scope="module")
def config() -> Any:
    """Of an engine, whose classes have most of what a network may be made of."""
    if ENGINE is None:
        pytest.skip("no engine is installed")
    return network()


def changed(config: Any, name: str, value: Any) -> Any:
    assert name in {field.name for field in dataclasses.fields(config)}
    if isinstance(value, bool):
        value = not getattr(config, name)  # what is usual differs between the engines
    other = copy.copy(config)
    setattr(other, name, value)
    assert getattr(config, name) != value
    return other


@pytest.mark.parametrize("name", FORWARD)
def test_what_a_forward_pass_depends_on_changes_the_fingerprint(config: Any, name: str) -> None:
    from nemo_rao.mcore.network import network_fingerprint

    assert network_fingerprint(changed(config, name, FORWARD[name])) != network_fingerprint(config)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_how_the_work_is_divided_does_not(config: Any, name: str) -> None:
    from nemo_rao.mcore.network import network_fingerprint

    assert network_fingerprint(changed(config, name, ELSEWHERE[name])) == network_fingerprint(config)


def test_layers_are_the_same_with_and_without_transformer_engine(config: Any) -> None:
    """A machine without it gets another spec, and reads the numbers that one with it has computed."""
    from nemo_rao.mcore.flex_attention import layer_spec_with_flex_attention
    from nemo_rao.mcore.fp8_simulation import layer_spec_with_simulated_fp8
    from nemo_rao.mcore.layer_spec import layer_spec_without_te
    from nemo_rao.mcore.network import network_fingerprint

    of_engine = importlib.import_module(SPECS[ENGINE]).transformer_engine_layer_spec
    simulated = functools.partial(layer_spec_with_simulated_fp8, simulation=object())
    found = set()
    sharing = functools.partial(layer_spec_with_flex_attention, spec=of_engine)
    for spec in (of_engine, layer_spec_without_te, simulated, sharing):
        other = copy.copy(config)
        other.transformer_layer_spec = spec
        found.add(network_fingerprint(other))
    assert found == {network_fingerprint(config)}


def test_scaled_rotary_frequencies_of_llama_3_1_count(config: Any) -> None:
    from nemo_rao.mcore.network import network_fingerprint

    factors = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    others = {"factor": 16.0}
    if ENGINE == NEMO:  # Bridge takes the others as given, and refuses another value
        others |= {"low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 4096}
    scalings = [factors, *({**factors, name: value} for name, value in others.items())]
    prints = {
        network_fingerprint(network(*(f"model.arch.rope_scaling.{name}={value}" for name, value in scaling.items())))
        for scaling in scalings
    }
    assert len(prints | {network_fingerprint(config)}) == len(scalings) + 1


def test_a_class_that_builds_another_model_from_the_same_fields_counts(config: Any) -> None:
    from nemo_rao.mcore.network import network_fingerprint

    def build(self: Any, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError

    other = copy.copy(config)
    other.__class__ = type("Doubled", (type(config),), {BUILDS[ENGINE]: build})
    assert network_fingerprint(other) != network_fingerprint(config)


def test_a_field_that_this_version_does_not_know_counts(config: Any) -> None:
    from nemo_rao.mcore.network import network_fingerprint

    prints = set()
    for value in (1.0, 2.0):
        later = copy.copy(config)
        later.__class__ = dataclasses.make_dataclass("Later", [("rope_of_tomorrow", float, 1.0)], bases=(type(config),))
        later.rope_of_tomorrow = value
        prints.add(network_fingerprint(later))
    assert len(prints) == 2


def test_the_fingerprint_is_the_same_in_every_process(config: Any) -> None:
    """Nothing in it is an address: no part reads like one, whatever the class holds."""
    from nemo_rao.mcore.network import network_description

    if ENGINE == NEMO:
        from nemo.collections import llm

        others = [llm.Gemma2Config2B(), llm.MixtralConfig8x7B(), llm.Qwen2Config500M()]
    else:
        others = [network(f"model.family={name}") for name in ("mixtral", "qwen2", "qwen3", "gemma3", "gpt_oss")]
    for one in (config, *others):
        assert " at 0x" not in str(network_description(one))
