"""The Hugging Face model that is imported: found or downloaded, and held against what its config.json asks for.

Of weights, the headers alone are read here. No code of the model's is run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.families import FAMILIES, SUPPORTED, Family
from nemo_rao.integration.talk import say

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def local_folder(source: str, allow_pickle: bool) -> Path:
    """The folder that ``source`` is, or into which the model of that name has been downloaded.

    Args:
        allow_pickle: weights in ``*.bin`` are downloaded, too.

    Raises:
        UserError: there is neither such a folder nor such a model, or it is of a kind that cannot be imported.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"SOURCE: {source}: no such folder; give the folder or name (ORG/NAME) of a Hugging Face model")
    from huggingface_hub import snapshot_download

    say(f"downloading {source}")
    try:
        small = Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
        family_of(read_json(small / "config.json"), small)
        weights = ["*.safetensors", "*.bin"] if allow_pickle else ["*.safetensors"]
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja", *weights]))
    except UserError:
        raise
    except Exception as error:  # network, access, a name that there is not: each its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"SOURCE: {source} is no folder, and cannot be downloaded ({type(error).__name__}: {reason}); give a "
            "folder, or a name that huggingface.co knows"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object that ``file`` holds.

    Raises:
        UserError: it is missing, cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"SOURCE: {file.parent} has no {file.name}; give the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"SOURCE: {file} cannot be read ({reason}); download it again") from None
    if not isinstance(found, dict):
        raise UserError(f"SOURCE: {file} is no JSON object; download it again")
    return found


def family_of(given: Mapping[str, Any], source: Path) -> Family:
    """The family of a model with this config.json, which lies in ``source``.

    Raises:
        UserError: it is of none that can be imported.
    """
    architectures = given.get("architectures") or [f"model_type {given.get('model_type')}"]
    for family in FAMILIES:
        if family.architecture in architectures and given.get("model_type") == family.model_type:
            return family
    raise UserError(
        f"SOURCE: {source} is a {', '.join(map(str, architectures))}, which cannot be imported; {SUPPORTED} can"
    )


def weight_files(source: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights, all there.

    Raises:
        UserError: one is missing, or the weights are pickles and ``allow_pickle`` is not given.
    """
    if (source / _INDEX).is_file():
        named = read_json(source / _INDEX).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise UserError(f"SOURCE: {source / _INDEX} names no files (weight_map); download it again")
        names = sorted(set(map(str, named.values())))
        for name in names:
            if Path(name).name != name or not (source / name).is_file():
                raise UserError(f"SOURCE: {source / name} is missing, which {_INDEX} names; download it")
        return [source / name for name in names]
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    pickled = sorted(source.glob("pytorch_model*.bin"))
    if not pickled:
        raise UserError(f"SOURCE: {source} has no weights (model.safetensors, or {_INDEX} and its files)")
    if not allow_pickle:
        raise UserError(
            f"SOURCE: {source} has its weights in {pickled[0].name} alone, a pickle, which can run code when it is "
            "read; use a model in safetensors, or --allow-pickle if you trust whoever made it"
        )
    return pickled


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of each tensor of a safetensors file that is whole.

    Raises:
        UserError: it is cut off, or no such file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size - 8:
                raise UserError(f"SOURCE: {file} is cut off: {size} bytes, and its header alone has {length}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"SOURCE: {file} is no safetensors file ({type(error).__name__}); download it again") from None
    if size != end:
        raise UserError(f"SOURCE: {file} is not whole: {size} of {end} bytes; download it again")
    return found


def read_config(given: Mapping[str, Any], family: Family, source: Path) -> Any:
    """config.json with transformers' defaults.

    Raises:
        UserError: transformers refuses it, or Megatron would compute something else.
    """
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family.model_type].from_dict(dict(given))
        sizes = [config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size]
        whole = all(type(size) is int and size > 0 for size in sizes)
    except Exception as error:  # whatever its validation raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"SOURCE: {source / 'config.json'} is refused by transformers: {reason}") from None
    rope = vars(config).get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = {
        "sizes": None if whole else "not all whole numbers above 0",
        "quantization_config": "quantized weights" if given.get("quantization_config") else None,
        "hidden_act": None if config.hidden_act == "silu" else config.hidden_act,
        "attention_bias": "biases of the attention's output" if vars(config).get("attention_bias") else None,
        "mlp_bias": "biases of the feed-forward layers" if vars(config).get("mlp_bias") else None,
        "use_sliding_window": "windows in some layers" if vars(config).get("use_sliding_window") else None,
        "rope_scaling": None if kind == "default" or (kind, family.model_type) == ("llama3", "llama") else kind,
    }
    for name, what in wrong.items():
        if what is not None:
            raise UserError(f"SOURCE: {source / 'config.json'}: {name} ({what}) cannot be imported yet")
    return config


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def tensors_of(config: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a model of these sizes has."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, head_size(config)
    rows = {"q": config.num_attention_heads * head}
    rows["k"] = rows["v"] = config.num_key_value_heads * head
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}."
        for name, size in rows.items():
            tensors[f"{layer}self_attn.{name}_proj.weight"] = (size, hidden)
            if family.qkv_bias:
                tensors[f"{layer}self_attn.{name}_proj.bias"] = (size,)
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
    headers: Mapping[str, tuple[str, list[int]]], wanted: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Holds the tensors that ``source`` has (dtype and shape by name) against the shapes that are wanted.

    Raises:
        UserError: one is missing, left over, of another shape, or of a dtype that cannot be imported.
    """
    for name, shape in wanted.items():
        if name not in headers:
            raise UserError(f"SOURCE: {source} has no tensor {name}, which config.json asks for; download it again")
        dtype, found = headers[name]
        if tuple(found) != shape:
            raise UserError(f"SOURCE: {source}: tensor {name} has shape {found}, config.json asks for {list(shape)}")
        if dtype not in _DTYPES:
            raise UserError(f"SOURCE: {source}: tensor {name} is {dtype}; {', '.join(_DTYPES)} can be imported")
    # Tied models may store the matrix a second time; older Llamas store what follows from the config.
    left_over = [
        name for name in headers if name not in wanted and name != "lm_head.weight" and "rotary_emb" not in name
    ]
    if left_over:
        raise UserError(f"SOURCE: {source} has a tensor {left_over[0]}, for which the model has no place")


def widest_dtype(dtypes: set[str]) -> str | None:
    """The number format that holds all of these, so that nothing is rounded; ``None``: as config.json says."""
    names = {_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES}
    if not names:
        return None
    return names.pop() if len(names) == 1 else "float32"
