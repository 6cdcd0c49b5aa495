"""The NeMo checkpoint that is exported: what model it is, which tensors it has, and those tensors.

What the model is stands as text in the checkpoint's ``context/model.yaml``, which NeMo writes beside its pickled twin:
that one is never read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.checkpoint.find import names_of_model, stored_tensors
from nemo_rao.checkpoint.pickles import read_metadata
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.families import FAMILIES, MEGATRON_BIAS, QK_NORMS, SUPPORTED, Family
from nemo_rao.runtime.console import say

LAYERS = "decoder.layers."
SCORE_HEAD = "score_head.weight"  # of a reward model


@dataclass(frozen=True)
class Described:
    """A checkpoint, as its ``context/model.yaml`` describes it.

    Attributes:
        folder: of the checkpoint.
        family: of the model.
        config: fields of NeMo's config.
        lora: fields of NeMo's LoRA, or ``None``.
        tokenizer: folder, or name on huggingface.co.
    """

    folder: Path
    family: Family
    config: SimpleNamespace
    lora: Mapping[str, Any] | None
    tokenizer: str


def describe(checkpoint: Path) -> Described:
    """What model ``checkpoint`` has, without reading any pickle.

    Raises:
        UserError: it does not tell, or the model is of a kind that cannot be exported.
    """
    import yaml

    file = checkpoint / "context" / "model.yaml"
    try:
        found = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        config, transform, tokenizer = found["config"], found.get("model_transform"), found["tokenizer"]
        name = tokenizer["pretrained_model_name"]
        module, _, class_name = config["_target_"].rpartition(".")
    except FileNotFoundError:
        raise UserError(
            f"CHECKPOINT: {file} is missing, which tells what model it is; name a checkpoint that NeMo 2 wrote"
        ) from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"CHECKPOINT: {file} does not tell what model it is ({type(error).__name__}: {reason})"
        ) from None
    family = next((family for family in FAMILIES if family.nemo is not None and family.nemo.module == module), None)
    if family is None or config.get("num_moe_experts") or bool(config.get("qk_layernorm")) != family.of_nemo.qk_norm:
        raise UserError(f"CHECKPOINT: {checkpoint} is a {class_name}, which cannot be exported; {SUPPORTED} can")
    if config.get("seq_len_interpolation_factor") or config.get("add_bias_linear"):
        raise UserError(f"CHECKPOINT: {checkpoint}: interpolated positions and biases cannot be exported yet")
    config["kv_channels"] = config["kv_channels"] or config["hidden_size"] // config["num_attention_heads"]
    config["num_query_groups"] = config["num_query_groups"] or config["num_attention_heads"]
    folder = checkpoint / "context" / name
    return Described(
        folder=checkpoint,
        family=family,
        config=SimpleNamespace(**config),
        lora=transform,
        tokenizer=str(folder) if folder.is_dir() else name,
    )


def check_names(base: Described, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Holds the tensors of a checkpoint against what its model has, and tells which are left behind.

    Raises:
        UserError: one is missing.
    """
    tied = base.config.share_embeddings_and_output_weights
    wanted = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    wanted |= set() if tied else {"output_layer.weight"}
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        wanted |= {f"{LAYERS}{name}.weight", f"{LAYERS}{name}.layer_norm_weight"}
    wanted |= {f"{LAYERS}self_attention.linear_proj.weight", f"{LAYERS}mlp.linear_fc2.weight"}
    nemo = base.family.of_nemo
    parts = ([MEGATRON_BIAS] if nemo.qkv_bias else []) + (list(QK_NORMS.values()) if nemo.qk_norm else [])
    wanted |= {LAYERS + part.partition("*.")[2] for part in parts}
    missing = sorted(wanted - set(shapes))
    if missing == ["output_layer.weight"]:
        raise UserError(
            f"CHECKPOINT: {base.folder} has no output layer: it is a reward model, not one that generates; it cannot "
            "be exported"
        )
    if missing:
        raise UserError(f"CHECKPOINT: {base.folder} has no tensor {missing[0]}; name a {base.family.architecture}")
    left_behind = sorted(name for name in set(shapes) - wanted - {SCORE_HEAD} if not name.endswith("_extra_state"))
    if left_behind:
        say(f"not exported, as transformers has no place for it: {', '.join(left_behind)}")


def read_tensors(checkpoint: Path, num_layers: int, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """The model's tensors, whole, by Megatron's names; those that are stored for all layers in one, layer by layer.

    Args:
        only: names of those that are read; ``None``: all.
    """
    import torch
    from torch.distributed import checkpoint as torch_checkpoint

    described = stored_tensors(checkpoint, trusted=True)
    full_names = names_of_model(read_metadata(checkpoint, trusted=True).state_dict_metadata)
    stored = {name: full_name for full_name, name in full_names.items() if name in described}
    tensors = {
        stored[name]: torch.empty(shape, dtype=vars(torch)[dtype])
        for name, (shape, dtype) in described.items()
        if not name.endswith("_extra_state") and (only is None or name in only)
    }
    reader = torch_checkpoint.FileSystemReader(checkpoint / "weights")
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    found = {}
    for name in stored:
        if (tensor := tensors.get(stored[name])) is None:
            continue
        rest = name.removeprefix(LAYERS)
        if rest == name or rest[:1].isdigit():
            found[name] = tensor
        else:
            assert len(tensor) == num_layers, (name, tensor.shape)
            found |= {f"{LAYERS}{number}.{rest}": tensor[number] for number in range(num_layers)}
    return found
