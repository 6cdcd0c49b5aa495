"""Adapters of a LoRA run, as the files that ``peft`` reads, or merged into the weights that they change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.checkpoint import LAYERS, Described, read_tensors
from nemo_rao.hugging_face.conversion import import_nemo_aloud
from nemo_rao.integration.talk import say

# Megatron's linear layers, and Hugging Face's of which they are made.
PARTS = {
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
    unknown = sorted(set(described.lora["target_modules"]) - set(PARTS))
    kind = str(described.lora["_target_"]).rpartition(".")[2]
    if unknown or "LoRA" not in kind or "Canonical" in kind:
        what = f"{kind} of {', '.join(unknown)}" if unknown else kind
        raise UserError(f"CHECKPOINT: {described.folder}: {what} cannot be exported; LoRA of {', '.join(PARTS)} can")


def merge(weights: dict[str, Any], adapters: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Puts ``W + alpha / dim * B A``, in fp32, in place of each ``W``.

    Args:
        weights: ``[out, in]`` each, by Megatron's names; changed in place.
        adapters: ``A``, ``[dim, in]``, and ``B``, ``[out, dim]``, of some of these.
        lora: NeMo's fields of the LoRA, of which ``alpha`` and ``dim`` are read.
    """
    into, out = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
    for name in adapters:
        if name.endswith(into):
            layer = name.removesuffix(into)
            change = adapters[layer + out].float() @ adapters[name].float()
            weights[layer + ".weight"] = weights[layer + ".weight"].float() + lora["alpha"] / lora["dim"] * change


def write_adapters(described: Described, folder: Path, dtype: str) -> None:
    """The files that peft writes. It is not imported: it would want the whole model to tell where adapters belong.

    Args:
        folder: that is written into.
        dtype: of the adapters there, torch's name.
    """
    import torch
    from safetensors.torch import save_file

    lora, config = described.lora, described.config
    assert lora is not None
    say("reading the adapters")
    adapters = read_tensors(described.folder, config.num_layers)
    import_nemo_aloud()
    from nemo.lightning.io.state import TransformFns

    context = SimpleNamespace(source=SimpleNamespace(config=config))
    found: dict[str, Any] = {}
    for name, tensor in adapters.items():
        layer, _, matrix = name.removeprefix(LAYERS).partition(".adapter.")
        number, _, module = layer.partition(".")
        linear = module.rpartition(".")[2]
        if matrix == "linear_in.weight":
            letter, parts = "A", [tensor] * len(PARTS[linear])
        else:
            letter = "B"
            if linear == "linear_qkv":
                parts = list(TransformFns.split_qkv(context, tensor))
            else:
                parts = list(tensor.chunk(len(PARTS[linear])))
        for part, value in zip(PARTS[linear], parts, strict=True):
            whole = value.to(vars(torch)[dtype]).clone().contiguous()
            found[f"base_model.model.model.layers.{number}.{part}.lora_{letter}.weight"] = whole
    say("writing")
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [part.rpartition(".")[2] for name in lora["target_modules"] for part in PARTS[name]]
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _name_of_base(described),
        "r": lora["dim"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")


def _name_of_base(described: Described) -> str | None:
    """What the model was imported from, where the tokenizer's config.json tells."""
    file = Path(described.tokenizer) / "config.json"
    return json.loads(file.read_text()).get("_name_or_path") if file.is_file() else None
