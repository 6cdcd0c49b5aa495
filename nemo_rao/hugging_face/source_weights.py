"""The weights of the model that is imported: held against its config.json by their headers, and read.

Not by ``from_pretrained``: it reads the files as the installed release of transformers understands config.json, and
refuses safetensors whose metadata does not name a format.
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
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names, torch's
_ROTARY = ".rotary_emb.inv_freq"  # follows from config.json; older Llamas store it


def tensors_of(config: Any, family: Family) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of each tensor that a model of these sizes has; ``None`` for a family that NeMo does not convert,
    of which Megatron-Bridge knows it.
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
    """Checks the tensors that ``source`` has.

    Args:
        headers: dtype, as safetensors call it, and shape, by name.
        wanted: from :func:`tensors_of`.

    Raises:
        UserError: one is missing, left over, of another shape, or of a dtype that cannot be imported.
    """
    if wanted is not None:
        check_names(headers, wanted, f"{KEY}: {source}")
        for name, shape in wanted.items():
            _, found = headers[name]
            if tuple(found) != shape:
                raise UserError(
                    f"{KEY}: {source}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}"
                )
    for name, (dtype, _) in headers.items():
        if dtype not in DTYPES:
            raise UserError(f"{KEY}: {source}: tensor {name} is {dtype}; {', '.join(DTYPES)} can be imported")


def read_tensors(files: Sequence[Path], wanted: Mapping[str, tuple[int, ...]], *, tied: bool) -> dict[str, Any]:
    """The model's tensors by name, all in the widest of their formats, so that nothing is rounded.

    Args:
        files: safetensors, or pickles, which are read as tensors alone.
        wanted: from :func:`tensors_of`.
        tied: input and output embeddings are one matrix.

    Raises:
        UserError: pickles that cannot be read, or tensors that are not those that are wanted.
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
    """The tensors of a ``*.bin`` by name; nothing else in it is loaded.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    import torch

    try:
        read = torch.load(file, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:  # of the archive, of the pickle, or of what it names
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{KEY}: {file} cannot be read ({type(error).__name__}: {reason}); use a model in safetensors"
        ) from None


def check_names(stored: Iterable[str], wanted: Iterable[str], place: str) -> None:
    """Checks that a model's tensors are all there, and no others.

    Args:
        place: what names the model, for messages.

    Raises:
        UserError: names the first one that is missing, or left over.
    """
    names = set(stored)
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{place} has no tensor {missing[0]}, which config.json asks for; download it again")
    # Tied models may store the matrix a second time.
    left_over = sorted(name for name in names.difference(wanted) if name != OUTPUT and not name.endswith(_ROTARY))
    if left_over:
        raise UserError(f"{place} has a tensor {left_over[0]}, for which the model has no place")


def check_tie(tensors: Mapping[str, Any], folder: Path) -> None:
    """Checks that an output layer, where one is stored, is the embeddings, as config.json says.

    Raises:
        UserError: it is another matrix.
    """
    import torch

    if OUTPUT in tensors and not torch.equal(tensors[OUTPUT], tensors[EMBEDDINGS]):
        raise UserError(
            f"{KEY}: {folder}: config.json ties the embeddings (tie_word_embeddings), but {OUTPUT} is stored "
            "with other values; set tie_word_embeddings to false in config.json if both matrices are the model's"
        )
