"""A family with sizes is the network of NeMo's class of them, field by field, imported or read as source."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import pytest

from nemo_rao.config.compose import compose, override, package_recipes
from nemo_rao.engines.nemo.config_classes import NOT_CONSTANT, config_fields, fields_of_class
from nemo_rao.errors import UserError
from nemo_rao.planning.network import network_of
from nemo_rao.planning.plan import network_of_config

from ..engines import needs_nemo
from .children import in_child

TOKENS = 1003
FAMILIES = (".llama", ".qwen2", ".qwen3", ".mistral", ".gemma")
# Model of conf/ -> NeMo's class of it.
CLASSES = {
    "tiny_llama": "LlamaConfig",
    "demo_llama": "LlamaConfig",
    "smollm2_135m": "LlamaConfig",
    "eurollm_9b": "LlamaConfig",
    "llama3_8b": "Llama3Config8B",
    "llama3_70b": "Llama3Config70B",
    "llama3_70b_lora": "Llama3Config70B",
    "llama3_1_405b": "Llama31Config405B",
    "qwen2_5_7b": "Qwen25Config7B",
    "qwen2_5_72b": "Qwen25Config72B",
    "mixtral_8x7b": "MixtralConfig8x7B",
    "qwen3_8b": "Qwen3Config8B",
    "qwen3_32b": "Qwen3Config32B",
    "qwen3_30b_a3b": "Qwen3Config30B_A3B",
}


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


@needs_nemo
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


def _unlike() -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Of models of conf/, and of NeMo's classes of a family: fields in which the two ways to describe them differ."""
    from nemo.collections import llm

    from nemo_rao.engines.nemo import build
    from nemo_rao.engines.nemo.families import config_of_family
    from nemo_rao.mcore.finish import finish_config
    from nemo_rao.mcore.network import network_fingerprint

    def differences(one: Any, other: Any) -> list[str]:
        found = []
        for field in dataclasses.fields(other):
            values = getattr(one, field.name, None), getattr(other, field.name)
            # Of functions that a config makes, the name and the arguments.
            if values[0] != values[1] and (not callable(values[0]) or str(values[0]) != str(values[1])):
                found.append(f"{field.name}: {values[0]} and {values[1]}")
        for finish in (False, True):
            for made in (one, other) if finish else ():
                finish_config(made, fp8_simulation=None)
            found += [] if network_fingerprint(one) == network_fingerprint(other) else [f"fingerprint, {finish}"]
        return found

    models = {}
    for model, name in CLASSES.items():
        new = compose("gpt_rao", [f"model={model}"])
        own_sizes = name == "LlamaConfig"
        sizes = (
            []
            if own_sizes
            else [f"model.arch.{size}=null" for size in (*SIZES_OF_CLASSES, "rotary_base", "rope_scaling.factor")]
        )
        old = override(new, [f"model.config_class={name}", *sizes])
        if not own_sizes:
            for size in (
                "init_method_std",
                "layernorm_epsilon",
                "moe_ffn_hidden_size",
                "num_moe_experts",
                "moe_router_topk",
            ):
                old.model.arch.extra.pop(size, None)
        models[model] = differences(build.model_config(new), build.model_config(old))
    classes = {}
    for name, made in vars(llm).items():
        if isinstance(made, type) and issubclass(made, llm.GPTConfig) and dataclasses.is_dataclass(made):
            family, fields = fields_of_class(name, {})
            if family is not None and fields["num_layers"]:
                old = made()
                classes[name] = differences(config_of_family(family, fields, seq_length=old.seq_length), old)
    return models, classes


SIZES_OF_CLASSES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


@needs_nemo
def test_a_family_with_sizes_is_built_as_nemos_class_of_them() -> None:
    """Down to the fingerprint by which a reference pass is found again."""
    models, classes = in_child(_unlike)
    assert not {name: found for name, found in models.items() if found}
    assert {path.stem for path in package_recipes().glob("model/*.yaml")} == set(CLASSES)
    assert not {name: found for name, found in classes.items() if found}
    assert classes.keys() >= {
        "Llama2Config7B",
        "Llama32Config1B",
        "CodeLlamaConfig34B",
        "Qwen3Config600M",
        "MistralNeMoConfig12B",
    }
    assert classes.keys() >= {"Qwen25Config14B", "MixtralConfig8x22B", "Qwen3Config235B_A22B", "MistralConfig7B"}
    assert not classes.keys() & {"Llama4Experts16Config", "Llama32EmbeddingConfig1B", "GPTConfig", "Gemma2Config2B"}


SIZES = ("num_layers", "hidden_size", "num_attention_heads", "gated_linear_unit", "normalization")


@needs_nemo
def test_sizes_that_a_class_derives_are_derived_alike(nemo: dict[str, dict[str, Any]]) -> None:
    compared = set()
    for name, found in nemo.items():
        if "completed" not in found:
            continue
        fields = config_fields(name)
        assert all(fields[size] == found["defaults"][size] for size in SIZES if size in found["defaults"])
        network, wanted = network_of(fields, kind=name, num_tokens=TOKENS, seq_length=8), found["completed"]
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
        pytest.param(("model.config_class=Llama3Confg8B",), "model.config_class", marks=needs_nemo),
        pytest.param(("model.config_class=DeepSeekV3Config",), "multi_latent_attention is set", marks=needs_nemo),
        (("model.family=gemma3",), "model.family=gemma3: norms after attention .* are not supported by the planner"),
        (
            ("model.family=gpt_oss",),
            "model.family=gpt_oss: learned attention sinks, .* are not supported by the planner",
        ),
        (("model.arch.extra={num_layers_in_first_pipeline_stage: 3}",), "is not supported by the planner"),
        (("model.arch.hidden_size=null",), "model.arch.hidden_size"),
        ((), "data.tokenizer"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(overrides: tuple[str, ...], part: str) -> None:
    with pytest.raises(UserError, match=part):
        network_of_config(override(compose("gpt_rao"), overrides))
