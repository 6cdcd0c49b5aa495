"""``nemo-rao export-hf``: a NeMo checkpoint becomes a folder that ``transformers`` loads, or adapters for ``peft``.

What the model is stands as text in the checkpoint's ``context/model.yaml``, which NeMo writes beside its pickled twin:
that one is never read. The weights' own format, torch_dist, has pickles, which are looked at first
(:mod:`nemo_rao.integration.pickles`).

Adapters of a LoRA run are merged, ``W + alpha / dim * B A`` in fp32, into the weights that the run started from; their
place stands beside the adapters, in ``weights/adapter_metadata.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.integration.checkpoints import check_checkpoint, resolve_checkpoint
from nemo_rao.integration.hugging_face import (
    FAMILIES,
    HF_BIASES,
    MEGATRON_BIAS,
    SUPPORTED,
    TOKENIZER_FILES,
    Family,
    Weights,
    check_destination,
    import_nemo_aloud,
    on_cpu_alone,
    written_whole,
)
from nemo_rao.integration.pickles import refuse_code
from nemo_rao.integration.talk import quiet_imports, quiet_third_parties, say

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "bf16": 2}

# Megatron's linear layers, and Hugging Face's of which they are made.
_PARTS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}


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


def main(arguments: argparse.Namespace) -> int:
    """Exports ``arguments.checkpoint`` to ``arguments.dest``.

    Raises:
        UserError: the checkpoint is not whole or of a family that is not known, or the destination does not suit.
    """
    on_cpu_alone()
    quiet_third_parties()
    described = _describe(resolve_checkpoint(arguments.checkpoint, "CHECKPOINT"))
    if arguments.adapters and described.lora is None:
        raise UserError(
            f"--adapters: {described.folder} has none, it is a whole model; leave the option out, or name a run with "
            "model.peft.scheme=lora"
        )
    base = described if described.lora is None else _describe(_base_of(described))
    if base.lora is not None:
        raise UserError(f"CHECKPOINT: {described.folder} has adapters for {base.folder}, which are adapters themselves")
    tokenizer = _load_tokenizer(described)
    vocab_size = base.config.vocab_size or len(tokenizer)
    remedy = "the checkpoint's context/ and weights/ are not of one model"
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  # what the check reads with
    if not arguments.allow_pickle:
        for folder in {base.folder, described.folder}:
            refuse_code(folder, "CHECKPOINT")
    check_checkpoint(base.folder, base.config, vocab_size, key="CHECKPOINT", remedy=remedy, trusted=True)
    shapes = {name: shape for name, (shape, _) in _stored(base.folder).items()}
    _check_names(base, shapes)
    if described.lora is not None:
        _check_adapters(described)

    wanted = described if arguments.adapters else base
    stored = {dtype for _, dtype in _stored(wanted.folder).values()}
    dtype = arguments.dtype or ("bf16" if stored == {"bfloat16"} else "fp32")
    num_bytes = sum(_count(shape) for shape, _ in _stored(wanted.folder).values()) * _BYTES[dtype]
    destination = check_destination(arguments.dest, num_bytes, "DEST")
    with written_whole(destination, "DEST") as partial:
        if arguments.adapters:
            _write_adapters(described, partial, dtype, tokenizer.name_or_path)
        else:
            _write_model(base, described, partial, dtype, vocab_size, tokenizer)
        _write_tokenizer(described, tokenizer, partial)
    if arguments.adapters:
        say(f"adapters  {destination}")
        say(f'to load   peft.PeftModel.from_pretrained(model, "{destination}"), model: what the run started from')
    else:
        kind = "SequenceClassification" if _SCORE_HEAD in shapes else "CausalLM"
        say(f"model    {destination}")
        say(f'to load  transformers.AutoModelFor{kind}.from_pretrained("{destination}")')
    return 0


# ------------------------------------------------------------------------------------------------ what is given


def _describe(checkpoint: Path) -> Described:
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
    family = next((family for family in FAMILIES if family.module == module), None)
    if family is None or config.get("num_moe_experts") or config.get("qk_layernorm"):
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


def _base_of(adapters: Described) -> Path:
    """The checkpoint whose weights the adapters change."""
    file = adapters.folder / "weights" / "adapter_metadata.json"
    try:
        path = json.loads(file.read_text())["model_ckpt_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"CHECKPOINT: {file} does not tell whose adapters these are; it cannot be exported") from None
    try:
        return resolve_checkpoint(path, "CHECKPOINT")
    except UserError:
        raise UserError(
            f"CHECKPOINT: {adapters.folder} has adapters for {path}, which is gone; put it back, or correct {file}"
        ) from None


def _load_tokenizer(described: Described) -> Any:
    from nemo_rao.data.encode import load_tokenizer

    return load_tokenizer(described.tokenizer)


def _stored(checkpoint: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each of the model's tensors, by its name without ``module.``; not the optimizer's."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    return {
        name.removeprefix("module."): (tuple(tensor.size), str(tensor.properties.dtype).removeprefix("torch."))
        for name, tensor in found.items()
        if isinstance(tensor, TensorStorageMetadata) and name.startswith("module.")
    }


def _count(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


_LAYERS = "decoder.layers."
_SCORE_HEAD = "score_head.weight"  # of a reward model


def _check_names(base: Described, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """That the model's tensors are there, and which are left behind."""
    tied = base.config.share_embeddings_and_output_weights
    wanted = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    wanted |= set() if tied else {"output_layer.weight"}
    for name in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        wanted |= {f"{_LAYERS}{name}.weight", f"{_LAYERS}{name}.layer_norm_weight"}
    wanted |= {f"{_LAYERS}self_attention.linear_proj.weight", f"{_LAYERS}mlp.linear_fc2.weight"}
    wanted |= {_LAYERS + MEGATRON_BIAS.partition("*.")[2]} if base.family.qkv_bias else set()
    missing = sorted(wanted - set(shapes))
    if missing == ["output_layer.weight"]:
        raise UserError(
            f"CHECKPOINT: {base.folder} has no output layer: it is a reward model, not one that generates; it cannot "
            "be exported"
        )
    if missing:
        raise UserError(f"CHECKPOINT: {base.folder} has no tensor {missing[0]}; name a {base.family.architecture}")
    left_behind = sorted(name for name in set(shapes) - wanted - {_SCORE_HEAD} if not name.endswith("_extra_state"))
    if left_behind:
        say(f"not exported, as transformers has no place for it: {', '.join(left_behind)}")


def _check_adapters(described: Described) -> None:
    assert described.lora is not None
    unknown = sorted(set(described.lora["target_modules"]) - set(_PARTS))
    kind = str(described.lora["_target_"]).rpartition(".")[2]
    if unknown or "LoRA" not in kind or "Canonical" in kind:
        what = f"{kind} of {', '.join(unknown)}" if unknown else kind
        raise UserError(f"CHECKPOINT: {described.folder}: {what} cannot be exported; LoRA of {', '.join(_PARTS)} can")


# ------------------------------------------------------------------------------------------------------- weights


def _read(checkpoint: Path, num_layers: int) -> dict[str, Any]:
    """The model's tensors, whole, by Megatron's names; those that are stored for all layers in one, layer by layer."""
    import torch
    from torch.distributed import checkpoint as torch_checkpoint

    tensors = {
        f"module.{name}": torch.empty(shape, dtype=vars(torch)[dtype])
        for name, (shape, dtype) in _stored(checkpoint).items()
        if not name.endswith("_extra_state")
    }
    reader = torch_checkpoint.FileSystemReader(checkpoint / "weights")
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    found = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.")
        rest = name.removeprefix(_LAYERS)
        if rest == name or rest[:1].isdigit():
            found[name] = tensor
        else:
            assert len(tensor) == num_layers, (name, tensor.shape)
            found |= {f"{_LAYERS}{number}.{rest}": tensor[number] for number in range(num_layers)}
    return found


def _merge(weights: dict[str, Any], adapters: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """``W + alpha / dim * B A``, in fp32, in place of each ``W``."""
    into, out = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
    for name in adapters:
        if name.endswith(into):
            layer = name.removesuffix(into)
            change = adapters[layer + out].float() @ adapters[name].float()
            weights[layer + ".weight"] = weights[layer + ".weight"].float() + lora["alpha"] / lora["dim"] * change


def _hf_config(base: Described, vocab_size: int, tokenizer: Any) -> Any:
    """Hugging Face's config. What NeMo's does not know comes from the config.json that stands with the tokenizer."""
    from transformers import CONFIG_MAPPING

    config = base.config
    carried: dict[str, Any] = {}
    with_tokenizer = Path(base.tokenizer) / "config.json"
    if with_tokenizer.is_file():
        found = json.loads(with_tokenizer.read_text())
        same = {"model_type": base.family.model_type, "hidden_size": config.hidden_size}
        if {name: found.get(name) for name in same} == same:
            carried = found
    rope = None
    if hasattr(config, "scale_factor"):
        rope = {
            "rope_type": "llama3",
            "factor": config.scale_factor,
            "low_freq_factor": config.low_freq_factor,
            "high_freq_factor": config.high_freq_factor,
            "original_max_position_embeddings": config.old_context_len,
        }
    of_family: dict[str, Any] = {}
    if base.family.model_type == "mistral":
        of_family["sliding_window"] = None if config.window_size is None else config.window_size[0] + 1
    # Llama's config always has it, the others' only where it does not follow from the sizes.
    if base.family.model_type == "llama" or config.kv_channels * config.num_attention_heads != config.hidden_size:
        of_family["head_dim"] = config.kv_channels
    return CONFIG_MAPPING[base.family.model_type](
        architectures=[base.family.architecture],
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        max_position_embeddings=max(config.seq_length, carried.get("max_position_embeddings") or 0),
        initializer_range=config.init_method_std,
        rms_norm_eps=config.layernorm_epsilon,
        rope_theta=config.rotary_base,
        rope_scaling=rope,
        vocab_size=vocab_size,
        tie_word_embeddings=bool(config.share_embeddings_and_output_weights),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **of_family,
    )


def _write_model(
    base: Described, described: Described, folder: Path, dtype: str, vocab_size: int, tokenizer: Any
) -> None:
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    hf_config = _hf_config(base, vocab_size, tokenizer)
    say("reading the weights")
    num_layers = base.config.num_layers
    weights = _read(base.folder, num_layers)
    if described.lora is not None:
        say(f"merging the adapters of {described.folder}")
        _merge(weights, _read(described.folder, num_layers), described.lora)
    torch_dtype = vars(torch)[_DTYPES[dtype]]
    source = Weights({name: tensor.to(torch_dtype) for name, tensor in weights.items()}, base.config)
    del weights

    import_nemo_aloud()
    from nemo.collections.llm.gpt.model.llama import HFLlamaExporter
    from nemo.lightning import io
    from nemo.lightning.io.state import TransformFns

    class Exporter(HFLlamaExporter):
        """NeMo's, told what it would otherwise unpickle."""

        config = property(lambda self: hf_config)

        def is_llama4(self) -> bool:
            return False

    transformers.logging.set_verbosity_error()
    say("converting")
    with no_init_weights():
        target = transformers.AutoModelForCausalLM.from_config(hf_config, torch_dtype=torch_dtype)
    target = Exporter(base.folder).convert_state(source, target)
    if base.family.qkv_bias:
        bias = io.state_transform(source_key=MEGATRON_BIAS, target_key=HF_BIASES, fn=TransformFns.split_qkv_bias)
        io.apply_transforms(source, target, mapping={}, transforms=[bias])
    target.tie_weights()
    if _SCORE_HEAD in source.state_dict():
        target = _classifier(target, source.state_dict()[_SCORE_HEAD], tokenizer)
    else:
        target.generation_config = _generation_config(base, tokenizer)
    say("writing")
    target.save_pretrained(folder)


def _classifier(model: Any, head: Any, tokenizer: Any) -> Any:
    """A reward model as a sequence classifier: a label for each of the head's scores, the scores its logits."""
    import copy

    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_utils import no_init_weights

    from nemo_rao.data.encode import Encoder

    config = copy.deepcopy(model.config)
    config.num_labels = len(head)
    # It reads the last token that is no padding. Where the end token pads, too, one row at a time is all it can do.
    ends = {Encoder(tokenizer).end_token_id, tokenizer.eos_token_id}
    config.pad_token_id = None if tokenizer.pad_token_id in ends else tokenizer.pad_token_id
    with no_init_weights():
        classifier = AutoModelForSequenceClassification.from_config(config, torch_dtype=model.dtype)
    classifier.model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        classifier.score.weight.copy_(head)
    return classifier


def _generation_config(base: Described, tokenizer: Any) -> Any:
    """The model's own, where it came with the tokenizer; generation ends at the end of a turn and of a text."""
    from transformers import GenerationConfig

    from nemo_rao.data.encode import Encoder

    ends = [Encoder(tokenizer).end_token_id]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    given = Path(base.tokenizer) / "generation_config.json"
    carried = json.loads(given.read_text()) if given.is_file() else {}
    carried.pop("_from_model_config", None)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig.from_dict({**carried, **tokens})


def _write_tokenizer(described: Described, tokenizer: Any, folder: Path) -> None:
    source = Path(described.tokenizer)
    if not source.is_dir():
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_adapters(described: Described, folder: Path, dtype: str, base_name: str) -> None:
    """The files that peft writes. It is not imported: it would want the whole model to tell where adapters belong."""
    import torch
    from safetensors.torch import save_file

    lora, config = described.lora, described.config
    assert lora is not None
    say("reading the adapters")
    adapters = _read(described.folder, config.num_layers)
    import_nemo_aloud()
    from nemo.lightning.io.state import TransformFns

    context = SimpleNamespace(source=SimpleNamespace(config=config))
    found: dict[str, Any] = {}
    for name, tensor in adapters.items():
        layer, _, matrix = name.removeprefix(_LAYERS).partition(".adapter.")
        number, _, module = layer.partition(".")
        linear = module.rpartition(".")[2]
        if matrix == "linear_in.weight":
            letter, parts = "A", [tensor] * len(_PARTS[linear])
        else:
            letter = "B"
            if linear == "linear_qkv":
                parts = list(TransformFns.split_qkv(context, tensor))
            else:
                parts = list(tensor.chunk(len(_PARTS[linear])))
        for part, value in zip(_PARTS[linear], parts, strict=True):
            whole = value.to(vars(torch)[_DTYPES[dtype]]).clone().contiguous()
            found[f"base_model.model.model.layers.{number}.{part}.lora_{letter}.weight"] = whole
    say("writing")
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [part.rpartition(".")[2] for name in lora["target_modules"] for part in _PARTS[name]]
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
