"""NeMo's configs for the families of :mod:`nemo_rao.config.families`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo.collections import llm
from nemo.collections.llm.gpt.model.base import GPTConfig

from nemo_rao.config.families import ACTIVATIONS
from nemo_rao.engines.nemo.config_classes import ROPE_SCALING
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.mcore.activations import activation

# Family -> a class of nemo.collections.llm; all of its sizes are replaced.
_CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig7B",
    "mixtral": "MixtralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3Config30B_A3B",
}
_SCALED_LLAMA = "Llama31Config8B"  # scales its rotary frequencies; the smallest such class of nemo.collections.llm


def class_named(name: str, key: str) -> type[GPTConfig]:
    """Return a class of ``nemo.collections.llm``.

    Raises:
        UserError: it does not exist; the message begins with ``key``.
    """
    classes = {
        found: value for found, value in vars(llm).items() if isinstance(value, type) and issubclass(value, GPTConfig)
    }
    if name not in classes:
        raise UserError(
            f"{key}: nemo.collections.llm has no GPT config named {name!r}{did_you_mean(name, classes, otherwise='.')}"
        )
    return classes[name]


def config_of_family(family: str, fields: Mapping[str, Any], **more: Any) -> GPTConfig:
    """Return NeMo's config of a network.

    Args:
        family: the value of ``model.family``.
        fields: see :mod:`nemo_rao.config.families`; includes every field that a family decides.
        more: further fields of Megatron's and NeMo's configs.

    Raises:
        UserError: NeMo does not have this family, or its class lacks a given field, or rejects the values.
    """
    key = f"model.family={family}"
    if family not in _CLASSES:
        raise UserError(f"{key}: is not supported by NeMo's engine. It supports {', '.join(_CLASSES)}.")
    fields = dict(fields)
    scaling = fields.pop("rope_scaling")
    config_class = class_named(_CLASSES[family] if scaling is None else _SCALED_LLAMA, key)
    if scaling is not None:
        fields |= {old: scaling[new] for old, new in ROPE_SCALING.items()}
    if fields["activation_func"] not in ACTIVATIONS:
        raise UserError(
            f"model.arch.extra.activation_func={fields['activation_func']}: must be one of {', '.join(ACTIVATIONS)}."
        )
    fields["activation_func"] = activation(fields["activation_func"])
    if family == "mistral":  # its class sets how context-parallel ranks exchange a window's keys, even without a window
        fields.setdefault("cp_comm_type", None if fields["window_size"] is None else "a2a")
    known = {field.name for field in dataclasses.fields(config_class)}
    # A field that this Megatron lacks is disabled there.
    fields = {name: value for name, value in fields.items() if name in known or value is not None}
    check_fields(config_class, fields)
    return construct(config_class, {**fields, **more})


def check_fields(config_class: type[GPTConfig], names: Mapping[str, Any]) -> None:
    """Reject fields that a class does not have."""
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known, otherwise=".")
            raise UserError(f"model.arch.extra.{name}: {config_class.__name__} has no such field{hint}")


def construct(config_class: type[GPTConfig], fields: Mapping[str, Any]) -> GPTConfig:
    """Create an instance, reporting its errors as user errors."""
    try:
        return config_class(**fields)
    except (AssertionError, ValueError) as error:
        raise UserError(f"model.arch: {config_class.__name__} rejects these sizes: {error}") from None
