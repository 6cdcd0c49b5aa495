"""Adapters of a LoRA run, as the files that ``peft`` reads, or merged into the weights that they change."""

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

# Megatron's linear layers, and Hugging Face's of which they are made.
PARTS = {
    "output_layer": ("lm_head",),
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


def check_adapters(described: Described) -> None:
    """Refuses adapters that neither can be merged nor have a form in peft.

    Raises:
        UserError: they are no LoRA of whole linear layers.
    """
    assert described.lora is not None
    names = stored_tensors(described.folder, trusted=True)
    layers = [name.removesuffix(_INTO) for name in names if name.endswith(_INTO)]
    unknown = sorted({layer for layer in layers if layer.rpartition(".")[2] not in PARTS or ".experts." in layer})
    kind = str(described.lora["_target_"]).rpartition(".")[2]
    if unknown or not layers or "LoRA" not in kind or "Canonical" in kind:
        what = f"{kind} of {unknown[0]}" if unknown else kind
        raise UserError(f"CHECKPOINT: {described.folder}: {what} cannot be exported; LoRA of {', '.join(PARTS)} can")


def keeps_tie(described: Described, adapters: Mapping[str, Any]) -> bool:
    """Whether input and output embeddings are one matrix, also with these adapters merged; reports where they part."""
    tied = bool(described.config.share_embeddings_and_output_weights)
    if tied and f"output_layer{_INTO}" in adapters:
        say("the adapter of the output layer changes it alone: the exported model's embeddings are not tied to it")
        return False
    return tied


def merge(weights: dict[str, Any], adapters: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Puts ``W + alpha / dim * B A``, in fp32, in place of each ``W``.

    Args:
        weights: ``[out, in]`` each, by Megatron's names; the mapping is changed, its tensors are not.
        adapters: ``A``, ``[dim, in]``, and ``B``, ``[out, dim]``, of some of these.
        lora: NeMo's fields of the LoRA, of which ``alpha`` and ``dim`` are read.
    """
    for name in adapters:
        if name.endswith(_INTO):
            layer = name.removesuffix(_INTO)
            change = adapters[layer + _OUT].float() @ adapters[name].float()
            weight = weights[layer + ".weight"].float()
            rows = min(len(weight), len(change))  # of a vocabulary, padded to what was TP's multiple at the time
            weights[layer + ".weight"] = weight[:rows] + lora["alpha"] / lora["dim"] * change[:rows]


def write_adapters(described: Described, folder: Path, dtype: str, vocab_size: int) -> None:
    """The files that peft writes. It is not imported: it would want the whole model to tell where adapters belong.

    Args:
        folder: that is written into.
        dtype: of the adapters there, torch's name.
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
            continue  # a value head, which no policy has
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
    """Rows of queries, keys and values, which Megatron keeps group by group: a group's queries, its key, its value."""
    groups, heads = config.num_query_groups, config.num_attention_heads
    by_group = tensor.unflatten(0, (groups, heads // groups + 2, config.kv_channels))
    return [by_group[:, :-2].flatten(0, 2), by_group[:, -2].flatten(0, 1), by_group[:, -1].flatten(0, 1)]


def _modules(layer: str) -> list[str]:
    """Hugging Face's modules of which a linear layer of Megatron's is made."""
    number = layer.removeprefix(LAYERS).partition(".")[0]
    before = f"model.layers.{number}." if layer.startswith(LAYERS) else ""
    return [before + part for part in PARTS[layer.rpartition(".")[2]]]


def _targets(layers: Sequence[str], config: SimpleNamespace) -> list[str]:
    """peft's ``target_modules``: short names where all layers of the model have such an adapter, else whole names."""
    counts = Counter(layer.rpartition(".")[2] for layer in layers)
    found: set[str] = set()
    for layer in layers:
        everywhere = counts[layer.rpartition(".")[2]] == config.num_layers
        found |= {name.rpartition(".")[2] if everywhere else name for name in _modules(layer)}
    return sorted(found)


def _name_of_base(described: Described) -> str | None:
    """What the model was imported from, where the tokenizer's config.json tells."""
    file = Path(described.tokenizer) / "config.json"
    return json.loads(file.read_text()).get("_name_or_path") if file.is_file() else None
