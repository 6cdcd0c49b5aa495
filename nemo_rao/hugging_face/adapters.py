"""Adapters of a LoRA run, written in the format of ``peft`` or merged into the base weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.checkpoint.find import stored_tensors
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.checkpoint import LAYERS, read_tensors
from nemo_rao.hugging_face.described import Described
from nemo_rao.runtime.console import say

_INTO, _OUT = ".adapter.linear_in.weight", ".adapter.linear_out.weight"

# Megatron's linear layers -> Hugging Face's modules that they combine.
PARTS = {
    "output_layer": ("lm_head",),
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


def check_adapters(described: Described) -> None:
    """Reject adapters that can neither be merged nor expressed in peft.

    Raises:
        UserError: they are not LoRA adapters of whole linear layers.
    """
    assert described.lora is not None
    names = stored_tensors(described.folder, trusted=True)
    layers = [name.removesuffix(_INTO) for name in names if name.endswith(_INTO)]
    unknown = sorted({layer for layer in layers if layer.rpartition(".")[2] not in PARTS or ".experts." in layer})
    kind = str(described.lora["_target_"]).rpartition(".")[2]
    if unknown or not layers or "LoRA" not in kind or "Canonical" in kind:
        what = f"{kind} of {unknown[0]}" if unknown else kind
        raise UserError(
            f"CHECKPOINT: {described.folder}: {what} cannot be exported. Only LoRA of {', '.join(PARTS)} can."
        )


def keeps_tie(described: Described, adapters: Mapping[str, Any]) -> bool:
    """Whether input and output embeddings are still one matrix with these adapters merged. Reports it if not."""
    tied = bool(described.config.share_embeddings_and_output_weights)
    if tied and f"output_layer{_INTO}" in adapters:
        say("the output layer has an adapter: the exported model's input and output embeddings are not tied")
        return False
    return tied


def merge(weights: dict[str, Any], adapters: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Replace each ``W`` by ``W + alpha / dim * B A``, computed in fp32.

    Args:
        weights: ``[out, in]`` each, by Megatron's names; the mapping is changed in place, its tensors are not.
        adapters: ``A``, ``[dim, in]``, and ``B``, ``[out, dim]``, for some of the weights.
        lora: NeMo's LoRA fields, of which ``alpha`` and ``dim`` are read.
    """
    for name in adapters:
        if name.endswith(_INTO):
            layer = name.removesuffix(_INTO)
            change = adapters[layer + _OUT].float() @ adapters[name].float()
            weight = weights[layer + ".weight"].float()
            rows = min(len(weight), len(change))  # vocabularies may be padded for different TP sizes
            weights[layer + ".weight"] = weight[:rows] + lora["alpha"] / lora["dim"] * change[:rows]


def write_adapters(described: Described, folder: Path, dtype: str, vocab_size: int) -> None:
    """Write adapters in peft's format. peft is not used: it would need the whole model to place the adapters.

    Args:
        folder: output directory.
        dtype: torch name of the dtype to write.
        vocab_size: V without padding.
    """
    import torch
    from safetensors.torch import save_file

    lora, config = described.lora, described.config
    assert lora is not None
    say("reading the adapters")
    adapters = read_tensors(described.folder, config.num_layers)
    found: dict[str, Any] = {}
    for name, tensor in adapters.items():
        layer, is_adapter, matrix = name.partition(".adapter.")
        if not is_adapter:
            continue  # a value head, which is not part of a policy
        linear = layer.rpartition(".")[2]
        if matrix == "linear_in.weight":
            letter, parts = "A", [tensor] * len(PARTS[linear])
        else:
            letter = "B"
            if linear == "linear_qkv":
                parts = split_qkv(tensor, config)
            elif linear == "output_layer":
                parts = [tensor[:vocab_size]]
            else:
                parts = list(tensor.chunk(len(PARTS[linear])))
        for module, value in zip(_modules(layer), parts, strict=True):
            whole = value.to(vars(torch)[dtype]).clone().contiguous()
            found[f"base_model.model.{module}.lora_{letter}.weight"] = whole
    say("writing")
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_of_base(described),
        "r": lora["dim"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": _targets([name.removesuffix(_INTO) for name in adapters if name.endswith(_INTO)], config),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")


def split_qkv(tensor: Any, config: SimpleNamespace) -> list[Any]:
    """Split rows into queries, keys and values. Megatron stores them by group: its queries, its key, its value."""
    groups, heads = config.num_query_groups, config.num_attention_heads
    by_group = tensor.unflatten(0, (groups, heads // groups + 2, config.kv_channels))
    return [by_group[:, :-2].flatten(0, 2), by_group[:, -2].flatten(0, 1), by_group[:, -1].flatten(0, 1)]


def _modules(layer: str) -> list[str]:
    """Hugging Face's modules that a linear layer of Megatron combines."""
    number = layer.removeprefix(LAYERS).partition(".")[0]
    before = f"model.layers.{number}." if layer.startswith(LAYERS) else ""
    return [before + part for part in PARTS[layer.rpartition(".")[2]]]


def _targets(layers: Sequence[str], config: SimpleNamespace) -> list[str]:
    """peft's ``target_modules``: short names if all layers of the model have such an adapter, else full names."""
    counts = Counter(layer.rpartition(".")[2] for layer in layers)
    found: set[str] = set()
    for layer in layers:
        everywhere = counts[layer.rpartition(".")[2]] == config.num_layers
        found |= {name.rpartition(".")[2] if everywhere else name for name in _modules(layer)}
    return sorted(found)


def _name_of_base(described: Described) -> str | None:
    """Name of the model that was imported, if the tokenizer's config.json has it."""
    file = Path(described.tokenizer) / "config.json"
    return json.loads(file.read_text()).get("_name_or_path") if file.is_file() else None
