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
_OF_FAMILIES = ("rope_local_base_freq", "query_pre_attn_scalar", "norm_topk_prob")  # neither sizes nor read by all
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

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
    "names the model": (
        *("architectures", "model_type", "_name_or_path", "_commit_hash", "transformers_version"),
        "_model_name_or_path",  # from a GGUF file
    ),
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
    "losses that balance experts are off in every run": ("output_router_logits", "router_aux_loss_coef"),
    "of classifiers": (
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
        "task_specific_params",
    ),
    "special tokens are the tokenizer's": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "pad_token"),
        "unk_token_id",
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
# What transformers 4 writes into every config.json, and 5 does not.
_SAMPLING_IN_4 = {
    **dict.fromkeys(("do_sample", "early_stopping", "remove_invalid_values"), False),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty", "length_penalty"), 1),
    "max_length": 20,
    "top_k": 50,
}
# Reasons that are reported where the value is not the usual one: the user may have counted on it.
_REPORTED = (_CODE, _DROPOUT, _SAMPLING)


def read_config(given: Mapping[str, Any], family: Family, place: str, ignored: Collection[str] | None = ()) -> Any:
    """The network's config by the names of transformers 4, with its defaults for what ``given`` leaves out.

    ``rope_scaling`` is ``None``, or has all settings of Llama 3's scaling.

    Args:
        given: config.json, as transformers 4 or 5 writes it.
        place: the file, for messages.
        ignored: keys that the user says do not change the network; only unknown ones may be among them;
            ``None``: all that are unknown, as those of a model that was imported were.

    Raises:
        UserError: a key that is unknown, or a value with which Megatron would compute something else.
    """
    from transformers import CONFIG_MAPPING

    flat = with_flat_rope(given, place)
    _check_fixed(flat, family, place)
    read = {name: flat[name] for name in _read_keys(family) if name in flat}
    unknown = [name for name in flat if name not in read and not _is_known(name, family)]
    ignored = unknown if ignored is None else ignored
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
    if "num_experts" in family.reads and "num_local_experts" in read:  # as transformers 5 writes it
        read["num_experts"] = read.pop("num_local_experts")
    try:
        made = CONFIG_MAPPING[family.model_type].from_dict(dict(read))
    except Exception as error:  # whatever its validation raises
        raise UserError(f"{place} is refused by transformers: {' '.join(str(error).split())[:200]}") from None
    network = _as_in_4(made, read)
    heads, groups = network.num_attention_heads, network.num_key_value_heads
    if heads % groups or (not vars(network).get("head_dim") and network.hidden_size % heads):
        raise UserError(
            f"{place}: num_attention_heads ({heads}) must divide hidden_size ({network.hidden_size}) and be a multiple "
            f"of num_key_value_heads ({groups}); download it again"
        )
    return network


def _as_in_4(made: Any, read: Mapping[str, Any]) -> SimpleNamespace:
    """All values of a config of transformers, with rotary embeddings as release 4 spells them."""
    values = made.to_dict()
    if (rope := values.pop(ROPE_PARAMETERS, None)) is not None:
        local = rope.get("sliding_attention")
        values["rope_theta"] = (rope if local is None else rope["full_attention"])["rope_theta"]
        if local is not None:
            values["rope_local_base_freq"] = local["rope_theta"]
    return SimpleNamespace(**{**values, "rope_scaling": read.get("rope_scaling")})


def notes(given: Mapping[str, Any], family: Family) -> list[str]:
    """A line for each harmless key that is left behind with a value that its author may have counted on."""
    from transformers import CONFIG_MAPPING

    usual = {**_SAMPLING_IN_4, **CONFIG_MAPPING[family.model_type]().to_dict()}
    return [
        f"config.json: {name}={_shown(value)} is left behind: {HARMLESS[name]}"
        for name, value in given.items()
        if HARMLESS.get(name) in _REPORTED and value != usual.get(name)
    ]


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def keys_of_network(family: Family) -> set[str]:
    """The keys of config.json that could change what a model of the family computes."""
    return {*_read_keys(family), *FIXED, *family.fixed, ROPE_PARAMETERS, "layer_types"}


def _read_keys(family: Family) -> tuple[str, ...]:
    windows = ("sliding_window",) if family.period else ()
    shared = [name for name in NUMBERS if name not in _OF_FAMILIES]
    return (*SIZES, *shared, "rope_scaling", "tie_word_embeddings", *windows, *family.reads)


def _is_known(name: str, family: Family) -> bool:
    return name in (*FIXED, *family.fixed, *HARMLESS, *family.unused, "layer_types", "sliding_window")


def _check_fixed(given: Mapping[str, Any], family: Family, place: str) -> None:
    for name, values in {**FIXED, **family.fixed}.items():
        if name in given and given[name] not in values:
            _refuse(place, name, given[name], f"only {' or '.join(map(_shown, values))} can be imported")
    window = given.get("sliding_window")
    if window is not None and not family.period and "sliding_window" not in family.unused:
        _refuse(place, "sliding_window", window, f"a {family.architecture} has no window; remove the key")
    layers, kinds = given.get("num_hidden_layers"), given.get("layer_types")
    if kinds is None:
        return
    if layers not in (len(kinds), None) or kinds != kinds_of_layers(family, len(kinds), window):
        wanted = ", ".join(sorted(set(kinds_of_layers(family, len(kinds), window))))
        _refuse(
            place,
            "layer_types",
            kinds,
            f"only {wanted} in the order of a {family.architecture} of num_hidden_layers={layers} can be imported",
        )


def kinds_of_layers(family: Family, num_layers: int, window: int | None) -> list[str]:
    """``layer_types`` of a model, as transformers 5 names them."""
    local, everywhere = "sliding_attention", "full_attention"
    if family.period < 2:
        return [local if family.period and window is not None else everywhere] * num_layers
    return [everywhere if (number + 1) % family.period == 0 else local for number in range(num_layers)]


def _check_read(read: Mapping[str, Any], family: Family, place: str) -> None:
    sizes = (*SIZES, *(name for name in family.reads if name not in _OF_FAMILIES))
    for name in sizes:
        value = read.get(name, 1)
        if not (_is_size(value) or (value is None and name in _MAY_BE_NULL)):
            _refuse(place, name, value, "it must be a whole number above 0; download it again")
    for name in NUMBERS:
        if name in read and not _is_number(read[name]):
            _refuse(place, name, read[name], "it must be a number above 0; download it again")
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if (value := read.get(name, False)) not in (True, False):
            _refuse(place, name, value, "it must be true or false; download it again")
    if (window := read.get("sliding_window")) is not None and not _is_size(window):
        _refuse(place, "sliding_window", window, "it must be a whole number above 0, or null; download it again")
    if family.period > 1 and "sliding_window" in read and window is None:
        _refuse(place, "sliding_window", window, f"a {family.architecture} has one; download it again")
    if (scaling := read.get("rope_scaling")) is not None:
        _check_scaling(scaling, family, place)


def _check_scaling(scaling: Mapping[str, Any], family: Family, place: str) -> None:
    kind = scaling["rope_type"]
    if kind == "default":
        _refuse(place, "rope_scaling", scaling, "rope_type default scales nothing; remove the other settings")
    if kind != family.rope_type:
        _refuse(place, "rope_scaling", scaling, "only the default, and llama3 of a LlamaForCausalLM, can be imported")
    if "rope_scaling" in family.fixed:
        return
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
