"""Classification of the keys of config.json: read, fixed to the values that Megatron supports, harmless, or unknown.

    read       determines the network: sizes, rotary embedding, window, tied embeddings
    fixed      would change the network; only the values of the supported networks are accepted
    harmless   does not change the network's output, each with its reason
    unknown    rejected, since some release of transformers may use it; ``--ignore-key`` declares it harmless

Only read keys are passed to transformers' config class, so harmless keys cannot have an effect there. The class fills
in the defaults. Releases 4 and 5 of transformers are covered; tests check all keys of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.families import Family
from nemo_rao.model_files.config_json import ROPE_PARAMETERS, with_flat_rope

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")  # follow from the other sizes
NUMBERS = ("initializer_range", "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar")
_OF_FAMILIES = (
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "norm_topk_prob",
)  # no sizes, not read for all
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

_OFF = (None, False)
# Key -> values for which the imported network is the same.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "use_sliding_window": _OFF,
    "use_mrope": _OFF,
    "rope_interleaved": _OFF,
    "is_causal": (None, True),
    "use_bidirectional_attention": _OFF,
    "partial_rotary_factor": (None, 1),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": _OFF,
    "tie_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
}

_SAMPLING = "sampling settings are not part of the network; export-hf copies generation_config.json"
_DROPOUT = "dropout in training is set by the recipe: model.arch.attention_dropout"
_CODE = "the model's code is never run"
# Reason -> keys that do not change the network's output.
_HARMLESS: dict[str, tuple[str, ...]] = {
    "names the model": (
        *("architectures", "model_type", "_name_or_path", "_commit_hash", "transformers_version"),
        "_model_name_or_path",  # from a GGUF file
    ),
    "the dtype of the stored tensors is kept": ("dtype", "torch_dtype", "use_bfloat16"),
    "outputs of a forward pass": (
        *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "use_cache"),
        *("output_scores", "return_dict_in_generate"),
    ),
    "implementation of the same computation": (
        *("pretraining_tp", "chunk_size_feed_forward", "torchscript", "tf_legacy_loss", "attn_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_flash_attn_2_enabled"),
    ),
    "these models always decode": ("is_decoder",),
    "load-balancing losses of experts are off in every run": ("output_router_logits", "router_aux_loss_coef"),
    "used by classifiers only": (
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
        "task_specific_params",
    ),
    "special tokens come from the tokenizer": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "pad_token"),
        "unk_token_id",
    ),
    "used by the tokenizer": (
        *("tokenizer_class", "prefix", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"),
    ),
    "the length is max_position_embeddings": ("max_sequence_length",),
    "metadata of the tools that wrote the model": (
        *("unsloth_fixed", "unsloth_version", "is_llama_config", "transformers.js_config"),
    ),
    _CODE: ("auto_map",),
    _DROPOUT: ("attention_dropout",),
    _SAMPLING: (
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "num_beam_groups", "diversity_penalty"),
    ),
}
HARMLESS = {key: reason for reason, keys in _HARMLESS.items() for key in keys}
# Keys that transformers 4 writes into every config.json, and 5 does not.
_SAMPLING_IN_4 = {
    **dict.fromkeys(("do_sample", "early_stopping", "remove_invalid_values"), False),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1),
    "max_length": 20,
    "top_k": 50,
}
# Reasons that are reported if the value is not the default, since the user may rely on it.
_REPORTED = (_CODE, _DROPOUT, _SAMPLING)


def read_config(given: Mapping[str, Any], family: Family, location: str, ignored: Collection[str] | None = ()) -> Any:
    """Read the network's config under the names of transformers 4, with its defaults for missing keys.

    ``rope_scaling`` is ``None``, or has all settings of Llama 3's scaling.

    Args:
        given: config.json, as written by transformers 4 or 5.
        location: the file, for messages.
        ignored: keys that the user declares harmless; all of them must be unknown. ``None``: all unknown keys, as for
            a model that has already been imported.

    Raises:
        UserError: a key is unknown, or a value would make Megatron compute something else.
    """
    from transformers import CONFIG_MAPPING

    flat = with_flat_rope(given, location)
    _check_fixed(flat, family, location)
    read = {name: flat[name] for name in _read_keys(family) if name in flat}
    unknown = [name for name in flat if name not in read and not _is_known(name, family)]
    ignored = unknown if ignored is None else ignored
    if wrong := sorted(set(ignored) - set(unknown)):
        raise UserError(
            f"--ignore-key {wrong[0]}: {location} has no such unknown key (unknown: {', '.join(unknown) or 'none'})"
        )
    for name in unknown:
        if name not in ignored and flat[name] is not None:
            raise UserError(
                f"{location}: key {name} ({_shown(flat[name])}) is unknown and may change the network. If "
                f"{family.architecture} does not depend on it, pass --ignore-key {name}."
            )
    _check_read(read, family, location)
    if "num_experts" in family.reads and "num_local_experts" in read:  # as transformers 5 writes it
        read["num_experts"] = read.pop("num_local_experts")
    try:
        made = CONFIG_MAPPING[family.model_type].from_dict(dict(read))
    except Exception as error:  # whatever its validation raises
        raise UserError(f"{location} is rejected by transformers: {' '.join(str(error).split())[:200]}") from None
    network = _as_in_4(made, read)
    heads, groups = network.num_attention_heads, network.num_key_value_heads
    if heads % groups or (not vars(network).get("head_dim") and network.hidden_size % heads):
        raise UserError(
            f"{location}: num_attention_heads ({heads}) must divide hidden_size ({network.hidden_size}) and be a "
            f"multiple of num_key_value_heads ({groups}). Download it again."
        )
    return network


def _as_in_4(made: Any, read: Mapping[str, Any]) -> SimpleNamespace:
    """All values of a transformers config, with rotary embeddings under the names of release 4."""
    values = made.to_dict()
    if (rope := values.pop(ROPE_PARAMETERS, None)) is not None:
        local = rope.get("sliding_attention")
        values["rope_theta"] = (rope if local is None else rope["full_attention"])["rope_theta"]
        if local is not None:
            values["rope_local_base_freq"] = local["rope_theta"]
    return SimpleNamespace(**{**values, "rope_scaling": read.get("rope_scaling")})


def notes(given: Mapping[str, Any], family: Family) -> list[str]:
    """One line for each harmless key that is dropped with a value that its author may rely on."""
    from transformers import CONFIG_MAPPING

    usual = {**_SAMPLING_IN_4, **CONFIG_MAPPING[family.model_type]().to_dict()}
    return [
        f"config.json: {name}={_shown(value)} is dropped: {HARMLESS[name]}"
        for name, value in given.items()
        if HARMLESS.get(name) in _REPORTED and value != usual.get(name)
    ]


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def keys_of_network(family: Family) -> set[str]:
    """Keys of config.json that can change the output of a model of the family."""
    return {*_read_keys(family), *FIXED, *family.fixed, ROPE_PARAMETERS, "layer_types"}


def _read_keys(family: Family) -> tuple[str, ...]:
    windows = ("sliding_window",) if family.period else ()
    shared = [name for name in NUMBERS if name not in _OF_FAMILIES]
    return (*SIZES, *shared, "rope_scaling", "tie_word_embeddings", *windows, *family.reads)


def _is_known(name: str, family: Family) -> bool:
    return name in (*FIXED, *family.fixed, *HARMLESS, *family.unused, "layer_types", "sliding_window")


def _check_fixed(given: Mapping[str, Any], family: Family, location: str) -> None:
    for name, values in {**FIXED, **family.fixed}.items():
        if name in given and given[name] not in values:
            _reject(location, name, given[name], f"only {' or '.join(map(_shown, values))} can be imported")
    window = given.get("sliding_window")
    if window is not None and not family.period and "sliding_window" not in family.unused:
        _reject(location, "sliding_window", window, f"{family.architecture} has no window. Remove the key.")
    layers, kinds = given.get("num_hidden_layers"), given.get("layer_types")
    if kinds is None:
        return
    if layers not in (len(kinds), None) or kinds != kinds_of_layers(family, len(kinds), window):
        wanted = ", ".join(sorted(set(kinds_of_layers(family, len(kinds), window))))
        _reject(
            location,
            "layer_types",
            kinds,
            f"only {wanted} in the order of {family.architecture} with num_hidden_layers={layers} can be imported",
        )


def kinds_of_layers(family: Family, num_layers: int, window: int | None) -> list[str]:
    """``layer_types`` of a model, as transformers 5 names them."""
    local, everywhere = "sliding_attention", "full_attention"
    if family.period < 2:
        return [local if family.period and window is not None else everywhere] * num_layers
    return [everywhere if (number + 1) % family.period == 0 else local for number in range(num_layers)]


def _check_read(read: Mapping[str, Any], family: Family, location: str) -> None:
    sizes = (*SIZES, *(name for name in family.reads if name not in _OF_FAMILIES))
    for name in sizes:
        value = read.get(name, 1)
        if not (_is_size(value) or (value is None and name in _MAY_BE_NULL)):
            _reject(location, name, value, "it must be a positive integer. Download it again.")
    for name in NUMBERS:
        if name in read and not _is_number(read[name]):
            _reject(location, name, read[name], "it must be a positive number. Download it again.")
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if (value := read.get(name, False)) not in (True, False):
            _reject(location, name, value, "it must be true or false. Download it again.")
    if (window := read.get("sliding_window")) is not None and not _is_size(window):
        _reject(location, "sliding_window", window, "it must be a positive integer, or null. Download it again.")
    if family.period > 1 and "sliding_window" in read and window is None:
        _reject(location, "sliding_window", window, f"{family.architecture} needs one. Download it again.")
    if (scaling := read.get("rope_scaling")) is not None:
        _check_scaling(scaling, family, location)


def _check_scaling(scaling: Mapping[str, Any], family: Family, location: str) -> None:
    kind = scaling["rope_type"]
    if kind == "default":
        _reject(location, "rope_scaling", scaling, "rope_type default does not scale. Remove the other settings.")
    if kind != family.rope_type:
        _reject(location, "rope_scaling", scaling, "only the default, and llama3 of LlamaForCausalLM, can be imported")
    if "rope_scaling" in family.fixed:
        return
    for name in _LLAMA3:
        if not _is_number(scaling.get(name)):
            _reject(
                location, f"rope_scaling.{name}", scaling.get(name), "it must be a positive number. Download it again."
            )
    if other := sorted(set(scaling) - {"rope_type", *_LLAMA3}):
        _reject(location, f"rope_scaling.{other[0]}", scaling[other[0]], "llama3 has no such setting. Remove it.")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _reject(location: str, name: str, value: Any, remedy: str) -> None:
    raise UserError(f"{location}: {name} ({_shown(value)}) cannot be imported: {remedy}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]
