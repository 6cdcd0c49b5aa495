"""Weights of the model to import: their headers are checked against config.json, then they are read.

``from_pretrained`` is not used: it follows the installed transformers' interpretation of config.json, and rejects
safetensors whose metadata does not name a format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import head_size
from nemo_rao.hugging_face.families import Family
from nemo_rao.hugging_face.source import KEY

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' name -> torch's
_ROTARY = ".rotary_emb.inv_freq"  # follows from config.json, but older Llamas store it


def tensors_of(config: Any, family: Family) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of each tensor of a model of these sizes; ``None`` for a family that only Megatron-Bridge
    converts, which then checks them.
    """
    if family.nemo_model is None:
        return None
    hidden, ffn, head = config.hidden_size, config.intermediate_size, head_size(config)
    rows = {"q": config.num_attention_heads * head}
    rows["k"] = rows["v"] = config.num_key_value_heads * head
    tensors: dict[str, tuple[int, ...]] = {
        EMBEDDINGS: (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        tensors[OUTPUT] = (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for name, size in rows.items():
            tensors[f"{layer}self_attn.{name}_proj.weight"] = (size, hidden)
            if family.qkv_bias:
                tensors[f"{layer}self_attn.{name}_proj.bias"] = (size,)
            if family.qk_norm and name != "v":
                tensors[f"{layer}self_attn.{name}_norm.weight"] = (head,)
        tensors |= {
            layer + "self_attn.o_proj.weight": (hidden, rows["q"]),
            layer + "mlp.gate_proj.weight": (ffn, hidden),
            layer + "mlp.up_proj.weight": (ffn, hidden),
            layer + "mlp.down_proj.weight": (hidden, ffn),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    return tensors


def check_tensors(
    headers: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, tuple[int, ...]] | None, source: Path
) -> None:
    """Check the tensors of ``source``.

    Args:
        headers: name -> (safetensors dtype, shape).
        wanted: from :func:`tensors_of`.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, or of a dtype that cannot be imported.
    """
    if wanted is not None:
        check_names(headers, wanted, f"{KEY}: {source}")
        for name, shape in wanted.items():
            _, found = headers[name]
            if tuple(found) != shape:
                raise UserError(
                    f"{KEY}: {source}: tensor {name} has shape {list(found)}, but config.json requires {list(shape)}"
                )
    for name, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            raise UserError(f"{KEY}: {source}: tensor {name} is {dtype}; only {', '.join(DTYPES)} can be imported")


def read_tensors(files: Sequence[Path], wanted: Mapping[str, tuple[int, ...]], *, tied: bool) -> dict[str, Any]:
    """Read the model's tensors by name, all in the widest dtype among them, so that nothing is rounded.

    Args:
        files: safetensors, or pickles, from which only tensors are loaded.
        wanted: from :func:`tensors_of`.
        tied: whether input and output embeddings are one matrix.

    Raises:
        UserError: a pickle cannot be read, or the tensors are not the expected ones.
    """
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in files:
        found |= load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    names = {f"torch.{name}": short for short, name in DTYPES.items()}
    stored = {
        name: (names.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in found.items()
    }
    check_tensors(stored, wanted, files[0].parent)
    if tied:
        check_tie(found, files[0].parent)
    kept = {name: found[name] for name in wanted}
    dtypes = {tensor.dtype for tensor in kept.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {name: tensor.to(dtype) for name, tensor in kept.items()}


def read_pickle(file: Path) -> dict[str, Any]:
    """Read the tensors of a ``*.bin`` by name. Nothing else in it is loaded.

    Raises:
        UserError: it cannot be read, or contains something else.
    """
    import torch

    try:
        read = torch.load(file, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # from the archive, the pickle, or the classes that it names
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{KEY}: {file} cannot be read ({type(error).__name__}: {reason}). Use a model in safetensors."
        ) from None


def check_names(stored: Iterable[str], wanted: Iterable[str], location: str) -> None:
    """Check that all of a model's tensors are present, and no others.

    Args:
        location: the model, for messages.

    Raises:
        UserError: a tensor is missing or unexpected; the message names the first one.
    """
    names = set(stored)
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{location} has no tensor {missing[0]}, which config.json requires. Download it again.")
    # Tied models may store the matrix a second time.
    left_over = sorted(name for name in names.difference(wanted) if name != OUTPUT and not name.endswith(_ROTARY))
    if left_over:
        raise UserError(f"{location} has an unexpected tensor {left_over[0]}, which the model does not use")


def check_tie(tensors: Mapping[str, Any], folder: Path) -> None:
    """Check that a stored output layer equals the embeddings, as config.json states.

    Raises:
        UserError: it differs.
    """
    import torch

    if OUTPUT in tensors and not torch.equal(tensors[OUTPUT], tensors[EMBEDDINGS]):
        raise UserError(
            f"{KEY}: {folder}: config.json ties the embeddings (tie_word_embeddings), but {OUTPUT} is stored "
            "with other values. Set tie_word_embeddings to false in config.json if the model has both matrices."
        )
