"""The Hugging Face model that is imported: found or downloaded, and held against what its config.json asks for.

Before the conversion only the headers of weights are read. No code of the model's is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import head_size, read_config
from nemo_rao.hugging_face.families import Family, families_of
from nemo_rao.model_files.config_json import read_json
from nemo_rao.runtime.console import say

KEY = "SOURCE"  # the argument that names the model
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Source:
    """A model that can be imported, as far as its config.json says.

    Attributes:
        folder: absolute.
        given: config.json.
        family: of the model.
        config: transformers' config of its network.
    """

    folder: Path
    given: Mapping[str, Any]
    family: Family
    config: Any


def find_source(source: str, *, engine: str, allow_pickle: bool, ignored: Collection[str]) -> Source:
    """The model in the folder that ``source`` is, or into which the model of that name is downloaded.

    Args:
        engine: that converts it.
        allow_pickle: weights in ``*.bin`` are downloaded, too.
        ignored: see :func:`nemo_rao.hugging_face.config_keys.read_config`.

    Raises:
        UserError: there is neither such a folder nor such a model, or it is one that cannot be imported; of a model
            that would be downloaded, before its weights are.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _describe(folder.absolute(), engine, ignored)
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"{KEY}: {source}: no such folder; give the folder or name (ORG/NAME) of a Hugging Face model")
    from huggingface_hub import snapshot_download

    say(f"downloading {source}")
    small = ["*.json", "*.model", "*.txt", "*.jinja"]
    weights = ["*.safetensors", "*.bin"] if allow_pickle else ["*.safetensors"]
    try:
        _describe(Path(snapshot_download(source, allow_patterns=small)), engine, ignored)
        return _describe(Path(snapshot_download(source, allow_patterns=[*small, *weights])), engine, ignored)
    except UserError:
        raise
    except Exception as error:  # network, access, a name that there is not: each its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{KEY}: {source} is not a folder, and cannot be downloaded ({type(error).__name__}: {reason}); give a "
            "folder, or a name that huggingface.co knows"
        ) from None


def _describe(folder: Path, engine: str, ignored: Collection[str]) -> Source:
    _check_kind(folder)
    given = read_json(folder / "config.json", KEY)
    family = family_of(given, folder, engine)
    return Source(folder, given, family, read_config(given, family, f"{KEY}: {folder / 'config.json'}", ignored))


def _check_kind(folder: Path) -> None:
    """Refuses folders without a config.json that are something else."""
    if (folder / "config.json").exists():
        return
    if (folder / "weights").is_dir() or (folder / "checkpoints").is_dir():
        raise UserError(
            f"{KEY}: {folder} is a NeMo checkpoint or a run already: model.restore_from_path takes it unchanged"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{KEY}: {folder} holds adapters alone (adapter_config.json); merge them into their model first, with "
            "peft's merge_and_unload"
        )


def family_of(given: Mapping[str, Any], source: Path, engine: str) -> Family:
    """The family of a model with this config.json, which lies in ``source``.

    Raises:
        UserError: it is of none that ``engine`` can import.
    """
    architectures = given.get("architectures") or [f"model_type {given.get('model_type')}"]
    families = families_of(engine)
    for family in families:
        if family.architecture in architectures and given.get("model_type") == family.model_type:
            return family
    raise UserError(
        f"{KEY}: {source} is a {', '.join(map(str, architectures))}, which cannot be imported; "
        f"{', '.join(family.architecture for family in families)} can"
    )


def tensors_of(config: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a model of these sizes has, of a family that NeMo converts."""
    assert family.nemo is not None
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
            if family.nemo.qkv_bias:
                tensors[f"{layer}self_attn.{name}_proj.bias"] = (size,)
            if family.nemo.qk_norm and name != "v":
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
    headers: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Holds the tensors that ``source`` has (dtype and shape by name) against the shapes that are wanted.

    Raises:
        UserError: one is missing, left over, of another shape, or of a dtype that cannot be imported.
    """
    for name, shape in wanted.items():
        if name not in headers:
            raise UserError(f"{KEY}: {source} has no tensor {name}, which config.json asks for; download it again")
        dtype, found = headers[name]
        if tuple(found) != shape:
            raise UserError(
                f"{KEY}: {source}: tensor {name} has shape {list(found)}, config.json asks for {list(shape)}"
            )
        if dtype not in _DTYPES:
            raise UserError(f"{KEY}: {source}: tensor {name} is {dtype}; {', '.join(_DTYPES)} can be imported")
    # Tied models may store the matrix a second time; older Llamas store what follows from the config.
    left_over = [name for name in headers if name not in wanted and name != OUTPUT and "rotary_emb" not in name]
    if left_over:
        raise UserError(f"{KEY}: {source} has a tensor {left_over[0]}, for which the model has no place")


def read_tensors(files: Sequence[Path], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The model's tensors by name, and a stored output layer of tied embeddings; all in the widest of their formats,
    so that nothing is rounded.

    Not ``from_pretrained``: it reads the files as the installed release of transformers understands config.json, and
    refuses safetensors whose metadata does not name a format.

    Args:
        files: safetensors, or pickles, which are read as tensors alone.
        wanted: from :func:`tensors_of`.

    Raises:
        UserError: pickles that cannot be read, or whose tensors are not those that are wanted.
    """
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= load_file(file)
            continue
        try:
            read = torch.load(file, map_location="cpu", weights_only=True)
            found |= {str(name): tensor for name, tensor in read.items() if isinstance(tensor, torch.Tensor)}
        except Exception as error:  # of the archive, of the pickle, or of what it names
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{KEY}: {file} cannot be read ({type(error).__name__}: {reason}); use a model in safetensors"
            ) from None
    names = {f"torch.{name}": short for short, name in _DTYPES.items()}
    stored = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in found.items()}
    stored = {name: (names.get(dtype, dtype), shape) for name, (dtype, shape) in stored.items()}
    check_tensors(stored, wanted, files[0].parent)
    kept = {name: tensor for name, tensor in found.items() if name in wanted or name == OUTPUT}
    dtypes = {tensor.dtype for tensor in kept.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {name: tensor.to(dtype) for name, tensor in kept.items()}
