"""Every key of a config.json: read, fixed to the values that Megatron computes, harmless, or refused.

    read       decides the network: sizes, rotary embedding, window, tied embeddings
    fixed      would decide the network; only the values of the networks that are imported are accepted
    harmless   does not change what the network computes, each with its reason
    unknown    refused, as another release of transformers may compute something with it; ``--ignore-key`` says it is
               harmless

Only what is read reaches transformers' config class, so a harmless key cannot have an effect there. The class fills in
the defaults. Releases 4 and 5 of transformers are covered; tests walk through all keys of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.families import Family
from nemo_rao.model_files.config_json import ROPE_PARAMETERS, with_flat_rope

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")  # follow from the other sizes
NUMBERS = ("initializer_range", "rms_norm_eps", "rope_theta")
_ROPE = (ROPE_PARAMETERS, "rope_scaling")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_WINDOWED = "mistral"

_OFF = (None, False)
# Key -> the values with which the network is the one that is imported.
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

_SAMPLING = "how text is sampled is not part of the network; export-hf carries generation_config.json along"
_DROPOUT = "dropout while training is the recipe's: model.arch.attention_dropout"
_CODE = "no code of the model's is run"
# Reason -> keys that do not change what the network computes.
_HARMLESS: dict[str, tuple[str, ...]] = {
    "names the model": ("architectures", "model_type", "_name_or_path", "_commit_hash", "transformers_version"),
    "the stored tensors' own number format is kept": ("dtype", "torch_dtype", "use_bfloat16"),
    "what a forward pass returns": (
        *("return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "use_cache"),
        *("output_scores", "return_dict_in_generate"),
    ),
    "how the same numbers are computed": (
        *("pretraining_tp", "chunk_size_feed_forward", "torchscript", "tf_legacy_loss", "attn_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("experts_implementation", "_experts_implementation", "_flash_attn_2_enabled"),
    ),
    "these models always decode": ("is_decoder",),
    "of classifiers": (
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
        "task_specific_params",
    ),
    "special tokens are the tokenizer's": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "pad_token"),
    ),
    "of the tokenizer": (
        *("tokenizer_class", "prefix", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"),
    ),
    "lengths are max_position_embeddings": ("max_sequence_length",),
    "notes of the tools that wrote the model": (
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
# Family -> keys that its network reads only with use_sliding_window.
_UNUSED_WINDOW = dict.fromkeys(("qwen2", "qwen3"), ("sliding_window", "max_window_layers"))
# Reasons that are reported where the value is not the usual one: the user may have counted on it.
_REPORTED = (_CODE, _DROPOUT, _SAMPLING)


def read_config(given: Mapping[str, Any], family: Family, place: str, ignored: Collection[str] = ()) -> Any:
    """transformers' config of the network, with its defaults for what ``given`` leaves out.

    ``rope_scaling`` is ``None``, or has all settings of Llama 3's scaling.

    Args:
        given: config.json, as transformers 4 or 5 writes it.
        place: the file, for messages.
        ignored: keys that the user says do not change the network; only unknown ones may be among them.

    Raises:
        UserError: a key that is unknown, or a value with which Megatron would compute something else.
    """
    from transformers import CONFIG_MAPPING

    flat = with_flat_rope(given, place)
    _check_fixed(flat, family, place)
    read = {name: flat[name] for name in _read_keys(family) if name in flat}
    unknown = [name for name in flat if name not in read and not _is_known(name, family)]
    if wrong := sorted(set(ignored) - set(unknown)):
        raise UserError(
            f"--ignore-key {wrong[0]}: {place} has no unknown key of that name ({', '.join(unknown) or 'none'} unknown)"
        )
    for name in unknown:
        if name not in ignored and flat[name] is not None:
            raise UserError(
                f"{place}: key {name} ({_shown(flat[name])}) is not known, and may change the network; if a "
                f"{family.architecture} does not depend on it, give --ignore-key {name}"
            )
    _check_read(read, family, place)
    try:
        config = CONFIG_MAPPING[family.model_type].from_dict(read)
    except Exception as error:  # whatever its validation raises
        raise UserError(f"{place} is refused by transformers: {' '.join(str(error).split())[:200]}") from None
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups or (not vars(config).get("head_dim") and config.hidden_size % heads):
        raise UserError(
            f"{place}: num_attention_heads ({heads}) must divide hidden_size ({config.hidden_size}) and be a multiple "
            f"of num_key_value_heads ({groups}); download it again"
        )
    config.rope_scaling = read.get("rope_scaling")
    return config


def notes(given: Mapping[str, Any], family: Family) -> list[str]:
    """A line for each harmless key that is left behind with a value that its author may have counted on."""
    from transformers import CONFIG_MAPPING

    usual = CONFIG_MAPPING[family.model_type]().to_dict()
    return [
        f"config.json: {name}={_shown(value)} is left behind: {HARMLESS[name]}"
        for name, value in given.items()
        if HARMLESS.get(name) in _REPORTED and value != usual.get(name)
    ]


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def _read_keys(family: Family) -> tuple[str, ...]:
    windows = ("sliding_window",) if family.model_type == _WINDOWED else ()
    return (*SIZES, *NUMBERS, "rope_scaling", "tie_word_embeddings", *windows)


def _is_known(name: str, family: Family) -> bool:
    known = (*FIXED, *HARMLESS, *_UNUSED_WINDOW.get(family.model_type, ()), "layer_types", "sliding_window")
    return name in known


def _check_fixed(given: Mapping[str, Any], family: Family, place: str) -> None:
    for name, values in FIXED.items():
        if name in given and given[name] not in values:
            _refuse(place, name, given[name], f"only {' or '.join(map(_shown, values))} can be imported")
    window = given.get("sliding_window")
    windowed = family.model_type == _WINDOWED
    if window is not None and not windowed and "sliding_window" not in _UNUSED_WINDOW.get(family.model_type, ()):
        _refuse(place, "sliding_window", window, f"a {family.architecture} has no window; remove the key")
    layers, kinds = given.get("num_hidden_layers"), given.get("layer_types")
    kind = "sliding_attention" if windowed and window is not None else "full_attention"
    if kinds is not None and (kinds != [kind] * len(kinds) or layers not in (len(kinds), None)):
        _refuse(place, "layer_types", kinds, f"only {kind} in all of the num_hidden_layers={layers} can be imported")


def _check_read(read: Mapping[str, Any], family: Family, place: str) -> None:
    for name in SIZES:
        value = read.get(name, 1)
        if not (_is_size(value) or (value is None and name in _MAY_BE_NULL)):
            _refuse(place, name, value, "it must be a whole number above 0; download it again")
    for name in NUMBERS:
        if name in read and not _is_number(read[name]):
            _refuse(place, name, read[name], "it must be a number above 0; download it again")
    if (tied := read.get("tie_word_embeddings", False)) not in (True, False):
        _refuse(place, "tie_word_embeddings", tied, "it must be true or false; download it again")
    if (window := read.get("sliding_window")) is not None and not _is_size(window):
        _refuse(place, "sliding_window", window, "it must be a whole number above 0, or null; download it again")
    if (scaling := read.get("rope_scaling")) is not None:
        _check_scaling(scaling, family, place)


def _check_scaling(scaling: Mapping[str, Any], family: Family, place: str) -> None:
    kind = scaling["rope_type"]
    if kind == "default":
        _refuse(place, "rope_scaling", scaling, "rope_type default scales nothing; remove the other settings")
    if (kind, family.model_type) != ("llama3", "llama"):
        _refuse(place, "rope_scaling", scaling, "only the default, and llama3 of a LlamaForCausalLM, can be imported")
    for name in _LLAMA3:
        if not _is_number(scaling.get(name)):
            _refuse(place, f"rope_scaling.{name}", scaling.get(name), "it must be a number above 0; download it again")
    if other := sorted(set(scaling) - {"rope_type", *_LLAMA3}):
        _refuse(place, f"rope_scaling.{other[0]}", scaling[other[0]], "llama3 has no such setting; remove it")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _refuse(place: str, name: str, value: Any, remedy: str) -> None:
    raise UserError(f"{place}: {name} ({_shown(value)}) cannot be imported: {remedy}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:100]
