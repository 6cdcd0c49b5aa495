"""``nemo-rao import-hf``: a Hugging Face model becomes a NeMo checkpoint, its tokenizer, and a recipe's model group.

    DEST/weights, DEST/context    the checkpoint: model.restore_from_path=DEST
    DEST/tokenizer                tokenizer, chat template, config.json: data.tokenizer=DEST/tokenizer
    DEST/model/imported.yaml      sizes and both paths: --config-dir DEST model=imported, with any recipe

Weights are read from safetensors, whose headers are held against config.json before anything else: nothing is missing,
of another shape, cut off, or left over. No code of the model's is run.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.integration.hugging_face import (
    FAMILIES,
    HF_BIASES,
    MEGATRON_BIAS,
    SUPPORTED,
    TOKENIZER_FILES,
    Family,
    check_destination,
    import_nemo_aloud,
    on_cpu_alone,
    written_whole,
)
from nemo_rao.integration.launch import launch
from nemo_rao.integration.talk import quiet_third_parties, say

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONGEST = 4096  # tokens; a recipe's model.seq_length is the model's own length, or this


def main(arguments: argparse.Namespace) -> int:
    """Imports ``arguments.source`` into ``arguments.dest``.

    Raises:
        UserError: it is no whole model of a family that is known, or the destination does not suit.
    """
    on_cpu_alone()
    quiet_third_parties()
    source = _local(arguments.source, arguments.allow_pickle)
    given = _read_json(source / "config.json")
    family = _family(given, source)
    files = _weight_files(source, arguments.allow_pickle)
    headers: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            headers |= _header(file)
    destination = check_destination(arguments.dest, sum(file.stat().st_size for file in files), "DEST")

    config = _hf_config(given, family, source)
    if headers:
        _check_tensors(headers, _tensors_of(config, family), source)
    from nemo_rao.data.encode import load_tokenizer

    num_tokens = len(load_tokenizer(source))
    if num_tokens > config.vocab_size:
        raise UserError(
            f"SOURCE: the tokenizer in {source} has {num_tokens} tokens, more than the {config.vocab_size} of the "
            "model's embeddings; give the model its own tokenizer"
        )
    keys = model_keys(config, family)
    num_parameters = sum(math.prod(shape) for shape in _tensors_of(config, family).values())
    say(f"{family.architecture} of {num_parameters:,} parameters in {len(files)} files of {source}")
    with written_whole(destination, "DEST") as partial:
        _copy_tokenizer(source, partial / "tokenizer", given, arguments.source)
        dtype = _widest({dtype for dtype, _ in headers.values()})
        launch(_convert, (source, partial, family, keys, config, dtype, not headers), num_ranks=1)
        say("writing the recipe's model group")
        (partial / "model").mkdir()
        (partial / "model" / "imported.yaml").write_text(_recipe(destination, keys, config, num_tokens))
    say(f"checkpoint  {destination}")
    say(f"tokenizer   {destination / 'tokenizer'}")
    say(
        f"to train    nemo-rao train --config-dir {shlex.quote(str(destination))} --config-name gpt_rao model=imported "
        "data.train_path=prefs.jsonl"
    )
    return 0


# -------------------------------------------------------------------------------------------------- what is given


def _local(source: str, allow_pickle: bool) -> Path:
    """The folder that ``source`` is, or into which the model of that name has been downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(f"SOURCE: {source}: no such folder; give the folder or name (ORG/NAME) of a Hugging Face model")
    from huggingface_hub import snapshot_download

    say(f"downloading {source}")
    try:
        small = Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
        _family(_read_json(small / "config.json"), small)
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


def _read_json(file: Path) -> dict[str, Any]:
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


def _family(given: Mapping[str, Any], source: Path) -> Family:
    architectures = given.get("architectures") or [f"model_type {given.get('model_type')}"]
    for family in FAMILIES:
        if family.architecture in architectures and given.get("model_type") == family.model_type:
            return family
    raise UserError(
        f"SOURCE: {source} is a {', '.join(map(str, architectures))}, which cannot be imported; {SUPPORTED} can"
    )


def _weight_files(source: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights, all there."""
    if (source / _INDEX).is_file():
        named = _read_json(source / _INDEX).get("weight_map")
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


def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of each tensor of a safetensors file that is whole."""
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


def _hf_config(given: Mapping[str, Any], family: Family, source: Path) -> Any:
    """config.json with transformers' defaults; refused where Megatron would compute something else."""
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


def _head_size(config: Any) -> int:
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def _tensors_of(config: Any, family: Family) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a model of these sizes has."""
    hidden, ffn, head = config.hidden_size, config.intermediate_size, _head_size(config)
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


def _check_tensors(
    headers: Mapping[str, tuple[str, list[int]]], wanted: Mapping[str, tuple[int, ...]], source: Path
) -> None:
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


def _widest(dtypes: set[str]) -> str | None:
    """The number format that holds all of these, so that nothing is rounded; ``None``: as config.json says."""
    names = {_DTYPES[dtype] for dtype in dtypes if dtype in _DTYPES}
    if not names:
        return None
    return names.pop() if len(names) == 1 else "float32"


# ---------------------------------------------------------------------------------------------------- what is made


def model_keys(config: Any, family: Family) -> dict[str, Any]:
    """``model.config_class`` and ``model.arch`` of a recipe, from Hugging Face's config; without ``vocab_size``."""
    rope = vars(config).get("rope_scaling") or {}
    extra: dict[str, Any] = {"layernorm_epsilon": config.rms_norm_eps, "init_method_std": config.initializer_range}
    config_class = family.config_class
    if rope:
        config_class = "Llama31Config8B"  # the smallest of a scaled Llama that nemo.collections.llm offers; see arch
        extra |= {
            "scale_factor": float(rope["factor"]),
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "old_context_len": int(rope["original_max_position_embeddings"]),
        }
    if family.model_type == "mistral":
        # Megatron counts the tokens before the present one, Hugging Face that one, too.
        window = config.sliding_window
        extra |= {"window_size": None, "cp_comm_type": None} if window is None else {"window_size": [window - 1, 0]}
    arch = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": _head_size(config),
        "rotary_base": float(config.rope_theta),
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "extra": extra,
    }
    return {"config_class": config_class, "arch": arch}


def _recipe(destination: Path, keys: Mapping[str, Any], config: Any, num_tokens: int) -> str:
    """A file of the group ``model``."""
    from nemo_rao.integration.recipe_text import shown

    arch = dict(keys["arch"])
    # Otherwise the tokenizer's: Megatron then pads it to whatever its parallelism needs.
    vocab_size = {} if num_tokens == config.vocab_size else {"vocab_size": config.vocab_size}
    extra = {**arch.pop("extra"), **vocab_size}
    lines = [
        "# @package _global_",
        "# Written by nemo-rao import-hf. For any recipe: --config-dir "
        f"{shlex.quote(str(destination))} model=imported. The two paths below are",
        "# absolute: change them if this folder is moved.",
        "model:",
        f"  restore_from_path: {shown(str(destination))}",
        f"  config_class: {keys['config_class']}",
        f"  seq_length: {min(config.max_position_embeddings, _LONGEST)}",
        "  arch:",
        *(f"    {name}: {shown(value)}" for name, value in arch.items()),
        "    extra:",
        *(f"      {name}: {shown(value)}" for name, value in extra.items()),
        "data:",
        f"  tokenizer: {shown(str(destination / 'tokenizer'))}",
    ]
    return "\n".join(lines) + "\n"


def _copy_tokenizer(source: Path, folder: Path, given: Mapping[str, Any], name: str) -> None:
    """The tokenizer as it is, in a folder of its own: NeMo copies that folder into every checkpoint."""
    folder.mkdir()
    for file in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / file).is_dir():
            shutil.copytree(source / file, folder / file)
        elif (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    kept = {key: value for key, value in given.items() if key != "auto_map"}
    (folder / "config.json").write_text(json.dumps({**kept, "_name_or_path": name}, indent=2) + "\n")


def _convert(
    source: Path, folder: Path, family: Family, keys: dict[str, Any], config: Any, dtype: str | None, pickled: bool
) -> None:
    """Read the weights, rename them with NeMo's importer, write the checkpoint."""
    import torch
    import transformers

    say("reading the weights")
    transformers.logging.set_verbosity_error()
    torch_dtype = vars(torch)[dtype] if dtype is not None else "auto"
    # Weights that were not there, or of another shape, would be drawn at random: the headers have told, and this does.
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        torch_dtype=torch_dtype,
        use_safetensors=not pickled,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if missing:
        raise UserError(f"SOURCE: {source} has no tensor {missing[0]}, which config.json asks for; download it again")

    import_nemo_aloud()
    from nemo.collections import llm
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns

    from nemo_rao.mcore.layer_spec import layer_spec_without_te

    say("converting")
    arch = dict(keys["arch"])
    made = vars(llm)[keys["config_class"]](
        **arch.pop("extra"),
        **arch,
        vocab_size=config.vocab_size,
        seq_length=config.max_position_embeddings,
        params_dtype=model.dtype,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
    )
    # After construction: the checkpoint's context is to know nothing of it.
    made.transformer_layer_spec = layer_spec_without_te
    made.perform_initialization = False
    target = vars(llm)[family.model_class](
        made, tokenizer=AutoTokenizer(str(folder / "tokenizer"), trust_remote_code=False)
    )
    importer = HFLlamaImporter(source)
    trainer = importer.nemo_setup(target, ckpt_async_save=False)
    importer.convert_state(model, target)
    if family.qkv_bias:
        bias = io.state_transform(source_key=HF_BIASES, target_key=MEGATRON_BIAS, fn=TransformFns.merge_qkv_bias)
        io.apply_transforms(model, target, mapping={}, transforms=[bias])
    del model
    say("writing the checkpoint")
    importer.nemo_save(folder, trainer)
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
