"""Every key of the families' config.json, as transformers 4 and 5 write it: with another value the imported network is
another one, or stays the same because the key is harmless, or the key is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import FIXED, HARMLESS, notes, read_config
from nemo_rao.hugging_face.families import FAMILIES
from nemo_rao.hugging_face.network import model_keys, network_fields
from nemo_rao.hugging_face.source import family_of
from nemo_rao.hugging_face.source_weights import tensors_of

from .config_table import table
from .models import LLAMA3_ROPE

WRITTEN = {
    **{release: json.loads(Path(__file__).with_name(f"transformers_{release}.json").read_text()) for release in (4, 5)},
    "installed": table(),
}
KEYS = [
    (release, family, key) for release in WRITTEN for family in WRITTEN[release] for key in WRITTEN[release][family]
]
# Values that a model could have, where a number, a negation or a text would be none.
OTHER = {
    "architectures": ["GPT2LMHeadModel"],
    "cross_attention_hidden_size": 48,
    "head_dim": 16,
    "hidden_act": "gelu",
    "hidden_size": 96,
    "layer_types": ["full_attention", "sliding_attention"],
    "model_type": "gpt2",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "pruned_heads": {"0": [1]},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 5e5,
    "sliding_window": 16,
}


def other(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    return {int: 7, float: 0.25, str: "other", list: [1], dict: {"0": "other"}, type(None): 7}[type(value)]


def network(given: dict[str, Any], *ignored: str) -> dict[str, Any]:
    """All that import-hf takes from config.json: keys of a recipe, tensors, the longest length."""
    family = family_of(given, Path("model"), BRIDGE)
    config = read_config(given, family, "SOURCE: config.json", ignored)
    found = {"fields": network_fields(config, family), "length": config.max_position_embeddings}
    return {
        **found,
        "tensors": tensors_of(config, family),
        "vocabulary": config.vocab_size,
        "keys": model_keys(config, family),
    }


@pytest.mark.parametrize(("release", "family", "key"), KEYS)
def test_no_key_is_ignored_that_could_change_the_network(release: Any, family: str, key: str) -> None:
    given = WRITTEN[release][family]
    changed = {**given, key: other(key, given[key])}
    assert changed[key] != given[key]
    try:
        found = network(changed)
    except UserError as error:
        named = "rope_scaling" if key == "rope_parameters" else key
        assert named in str(error) or key in ("model_type", "architectures")
        assert any(remedy in str(error) for remedy in ("can be imported", "LlamaForCausalLM", "Download it again"))
        assert key not in HARMLESS or key in ("model_type", "architectures")
        return
    unused = next(known.unused for known in FAMILIES if known.model_type == family)
    assert (found == network(given)) == (key in HARMLESS or key in unused)


@pytest.mark.parametrize("family", WRITTEN[4])
def test_both_releases_spell_the_same_network(family: str) -> None:
    assert network(WRITTEN[5][family]) == network(WRITTEN[4][family])


def test_a_key_is_of_one_kind() -> None:
    assert not set(FIXED) & set(HARMLESS)


LLAMA = {key: value for key, value in WRITTEN[4]["llama"].items() if key not in ("rope_theta", "rope_scaling")}
DEFAULT = {"rope_type": "default"}
SAME_ROPE: dict[str, tuple[list[dict[str, Any]], float, bool]] = {
    "the default": (
        [
            {},
            {"rope_scaling": None},
            {"rope_scaling": {}},
            {"rope_scaling": DEFAULT},
            {"rope_scaling": {"type": "default"}},
            {"rope_theta": 10000},
            {"rope_parameters": DEFAULT},
            {"rope_parameters": None},
            {"rope_parameters": {"rope_theta": 10000.0}},
        ],
        1e4,
        False,
    ),
    "a base": (
        [
            {"rope_theta": 5e5, "rope_scaling": DEFAULT},
            {"rope_parameters": {**DEFAULT, "rope_theta": 500000}},
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": None},
            {"rope_scaling": {**DEFAULT, "rope_theta": 5e5}},
        ],
        5e5,
        False,
    ),
    "llama 3's": (
        [
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
            {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
            {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
            {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}, "rope_scaling": LLAMA3_ROPE},
        ],
        5e5,
        True,
    ),
}


@pytest.mark.parametrize("name", SAME_ROPE)
def test_a_rotary_embedding_is_read_in_all_its_spellings(name: str) -> None:
    spellings, base, scaled = SAME_ROPE[name]
    for spelling in spellings:
        keys = network({**LLAMA, **spelling})["keys"]
        assert keys["arch"]["rotary_base"] == base, spelling
        scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_type"} if scaled else None
        assert keys["arch"].get("rope_scaling") == scaling, spelling


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two bases": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        "rope_theta is 10000.0, but 500000.0 in",
    ),
    "two scalings": (
        {"rope_scaling": LLAMA3_ROPE, "rope_parameters": DEFAULT},
        "rope_scaling and rope_parameters differ",
    ),
    "two kinds": ({"rope_scaling": {**LLAMA3_ROPE, "type": "yarn"}}, "rope_type is llama3, but type is yarn"),
    "a kind per layer": ({"rope_parameters": {"full_attention": DEFAULT}}, "differs by kind of layer"),
    "no object": ({"rope_scaling": 8.0}, "rope_scaling: must be an object such as"),
    "another kind": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling ("),
    "no factor": ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "rope_scaling.factor (null)"),
    "a further setting": ({"rope_scaling": {**LLAMA3_ROPE, "attention_factor": 2.0}}, "rope_scaling.attention_factor"),
    "a factor of nothing": ({"rope_scaling": {**DEFAULT, "factor": 4.0}}, "rope_type default does not scale"),
    "half of each head": (
        {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor (0.5)",
    ),
    "a base of 0": ({"rope_theta": 0}, "rope_theta (0) cannot be imported: it must be a positive number"),
    "a size in text": ({"hidden_size": "48"}, 'hidden_size ("48") cannot be imported: it must be a positive integer'),
    "heads that are no multiple": ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads (3)"),
    "a window": ({"sliding_window": 16}, "sliding_window (16) cannot be imported: LlamaForCausalLM has no window"),
    "both ways": ({"is_causal": False}, "is_causal (false)"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown": (
        {"new_key": 1},
        "key new_key (1) is unknown and may change the network. If LlamaForCausalLM does not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_mean_another_network_or_nothing_are_refused(name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        network({**LLAMA, **changes})
    assert said in str(error.value) and str(error.value).startswith("SOURCE: config.json")


def test_an_unknown_key_can_be_ignored_and_no_other() -> None:
    assert network({**LLAMA, "new_key": 1}, "new_key") == network({**LLAMA, "new_key": None}) == network(LLAMA)
    with pytest.raises(UserError, match=r"--ignore-key mlp_bias: .* no such unknown key"):
        network({**LLAMA, "new_key": 1}, "mlp_bias", "new_key")


def test_what_is_left_behind_though_it_may_be_counted_on_is_reported() -> None:
    assert notes(LLAMA, FAMILIES[0]) == []
    lines = notes({**LLAMA, "attention_dropout": 0.1, "temperature": 0.6, "use_cache": False}, FAMILIES[0])
    assert [line.partition(" is dropped")[0] for line in lines] == [
        "config.json: attention_dropout=0.1",
        "config.json: temperature=0.6",
    ]
