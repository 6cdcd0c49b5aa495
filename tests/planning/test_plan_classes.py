"""Sizes read from NeMo's source are those of its classes once imported."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import pytest

from nemo_rao.config.compose import compose, override
from nemo_rao.config.nemo_classes import NOT_CONSTANT, config_fields
from nemo_rao.errors import UserError
from nemo_rao.planning.network import network_of
from nemo_rao.planning.plan import network_of_config

from .children import in_child

TOKENS = 1003
FAMILIES = (".llama", ".qwen2", ".qwen3", ".mistral", ".gemma")


def _of_nemo() -> dict[str, dict[str, Any]]:
    """Class -> its plain defaults, and the sizes of an instance where it is one of a dense model."""
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.base import GPTConfig

    found = {}
    for name, made in vars(llm).items():
        if isinstance(made, type) and issubclass(made, GPTConfig) and dataclasses.is_dataclass(made):
            defaults = {field.name: field.default for field in dataclasses.fields(made)}
            plain = {
                field: value
                for field, value in defaults.items()
                if isinstance(value, (bool, int, float, str, type(None))) and not isinstance(value, enum.Enum)
            }
            found[name] = {"defaults": plain}
            sized = {"num_layers", "hidden_size", "num_attention_heads"} <= {
                name for name, size in plain.items() if size
            }
            # Of the families that are imported here; not those for whose experts or parts others are needed.
            if sized and made.__module__.endswith(FAMILIES) and plain["moe_ffn_hidden_size"] is None:
                instance = made()
                sizes = ("ffn_hidden_size", "num_query_groups", "kv_channels", "add_bias_linear", "vocab_size")
                found[name]["completed"] = {size: getattr(instance, size) for size in sizes}
    return found


@pytest.fixture(scope="module")
def nemo() -> dict[str, dict[str, Any]]:
    return in_child(_of_nemo)


def test_defaults_read_from_source_are_those_of_the_classes(nemo: dict[str, dict[str, Any]]) -> None:
    wrong, compared = [], 0
    for name, found in nemo.items():
        read = config_fields(name)
        for field, value in found["defaults"].items():
            if read.get(field, NOT_CONSTANT) is not NOT_CONSTANT:
                compared += 1
                if read[field] != value:
                    wrong.append(f"{name}.{field}: {read[field]} for {value}")
    assert not wrong and compared > 100 * len(nemo)


SIZES = ("num_layers", "hidden_size", "num_attention_heads", "gated_linear_unit", "normalization")


def test_sizes_that_a_class_derives_are_derived_alike(nemo: dict[str, dict[str, Any]]) -> None:
    compared = set()
    for name, found in nemo.items():
        if "completed" not in found:
            continue
        fields = config_fields(name)
        assert all(fields[size] == found["defaults"][size] for size in SIZES if size in found["defaults"])
        network, wanted = network_of(fields, config_class=name, num_tokens=TOKENS, seq_length=8), found["completed"]
        assert (network.ffn, network.groups, network.head) == (
            wanted["ffn_hidden_size"],
            wanted["num_query_groups"],
            wanted["kv_channels"],
        )
        assert network.linear_bias == wanted["add_bias_linear"]
        assert network.tokens == (wanted["vocab_size"] or TOKENS)
        compared.add(name)
    assert compared >= {"Llama3Config8B", "Qwen25Config7B", "MistralConfig7B", "Llama32Config1B"}


def test_recipes_name_the_published_sizes() -> None:
    llama = network_of_config(compose("gpt_rao_llama3_8b"))
    assert (llama.layers, llama.hidden, llama.ffn, llama.groups, llama.tokens) == (32, 4096, 14336, 8, 128256)
    qwen = network_of_config(compose("gpt_rao_qwen2_5_7b"))
    assert (qwen.layers, qwen.hidden, qwen.ffn, qwen.groups, qwen.tokens) == (28, 3584, 18944, 4, 152064)
    assert qwen.qkv_bias and not qwen.linear_bias


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("model.config_class=Llama3Confg8B",), "model.config_class"),
        (("model.config_class=DeepSeekV3Config",), "multi_latent_attention is set"),
        (("model.arch.extra={num_layers_in_first_pipeline_stage: 3}",), "stages of such sizes"),
        (("model.arch.hidden_size=null",), "model.arch.hidden_size"),
        ((), "data.tokenizer"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(overrides: tuple[str, ...], part: str) -> None:
    with pytest.raises(UserError, match=part):
        network_of_config(override(compose("gpt_rao"), overrides))
