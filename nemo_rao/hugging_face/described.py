"""Description of the model in a checkpoint to export, read from text files; no pickle is read.

    context/model.yaml       written by NeMo next to its pickled counterpart
    recipe.yaml              of the run that wrote the checkpoint
    tokenizer/config.json    written by import-hf

The recipe of a run describes the network in the same terms on both engines; NeMo's own file takes precedence, since it
has every field of the model that was built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.checkpoint.adapters import holds_adapters
from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.config.architecture import architecture_fields, family_of, network_key
from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.config.families import SIZES
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.engines.nemo.config_classes import ROPE_SCALING
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.config_keys import read_config
from nemo_rao.hugging_face.families import FAMILIES, Family, names_of
from nemo_rao.hugging_face.network import network_fields
from nemo_rao.hugging_face.source import family_of as family_of_config
from nemo_rao.model_files.config_json import read_json

KEY = "CHECKPOINT"  # the argument that names the checkpoint
_NEMO_MODELS = "nemo.collections.llm.gpt.model."


@dataclass(frozen=True)
class Described:
    """A checkpoint's model.

    Attributes:
        folder: the checkpoint's directory.
        family: the model's family.
        config: fields of :mod:`nemo_rao.config.families`; ``kv_channels`` and ``num_query_groups`` are never ``None``.
        lora: ``_target_``, ``dim``, ``alpha`` and ``dropout``, or ``None``.
        tokenizer: directory, or name on huggingface.co.
        seq_length: tokens that the network supports, at least.
    """

    folder: Path
    family: Family
    config: SimpleNamespace
    lora: Mapping[str, Any] | None
    tokenizer: str
    seq_length: int


def describe(checkpoint: Path, engine: str) -> Described:
    """Describe the model of ``checkpoint``.

    Args:
        engine: engine that converts it.

    Raises:
        UserError: no file describes it, or ``engine`` cannot export a model of this kind.
    """
    folder = checkpoint.resolve()
    recipe = folder.parent.parent / RECIPE
    has_recipe = folder.parent.name == "checkpoints" and recipe.is_file()
    written_by_nemo = checkpoint / "context" / "model.yaml"
    if written_by_nemo.is_file() and not (has_recipe and engine == BRIDGE):
        return _of_nemo(checkpoint, written_by_nemo, engine)
    if has_recipe:
        return _of_run(checkpoint, recipe, engine)
    files = [checkpoint / "tokenizer" / "config.json", *checkpoint.glob("context/*/config.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None or holds_adapters(checkpoint):
        raise UserError(
            f"{KEY}: {written_by_nemo} is missing, and no other file next to {checkpoint} describes its model. Pass a "
            "checkpoint of NeMo 2, one in the directory of its run, or the output of import-hf."
        )
    return _of_config(checkpoint, file, engine)


def _of_nemo(checkpoint: Path, file: Path, engine: str) -> Described:
    import yaml

    try:
        found = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        config, transform, tokenizer = found["config"], found.get("model_transform"), found["tokenizer"]
        name = tokenizer["pretrained_model_name"]
        module, _, class_name = config["_target_"].rpartition(".")
        activation = config["activation_func"]["_target_"].rpartition(".")[2]
        lora = None if transform is None else {key: transform[key] for key in ("_target_", "dim", "alpha", "dropout")}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{KEY}: {file} does not describe a model ({type(error).__name__}: {reason}). Restore the file."
        ) from None
    family = next((one for one in FAMILIES if one.nemo_model and module == _NEMO_MODELS + one.network.name), None)
    if family is None or config.get("num_moe_experts") or bool(config.get("qk_layernorm")) != family.qk_norm:
        raise _refusal(checkpoint, class_name, engine)
    if config.get("seq_len_interpolation_factor") or config.get("add_bias_linear"):
        raise UserError(f"{KEY}: {checkpoint}: interpolated positions and biases cannot be exported yet")
    fields = {name: config[name] for name in (*SIZES, *family.network.fields) if name in config}
    fields |= {"activation_func": activation, "rope_scaling": None}
    if "scale_factor" in config:
        fields["rope_scaling"] = {new: config[old] for old, new in ROPE_SCALING.items()}
    folder = checkpoint / "context" / name
    return _described(checkpoint, family, fields, lora, str(folder) if folder.is_dir() else name, config["seq_length"])


def describe_run(config: RunConfig, folder: Path, tokenizer: str, engine: str) -> Described:
    """Describe the model of a run.

    Args:
        folder: directory of the run or of its checkpoint, for messages.
        tokenizer: directory, or name on huggingface.co.
        engine: engine that converts it.

    Raises:
        UserError: ``engine`` cannot export a model of this kind.
    """
    network = family_of(config)
    family = next((family for family in FAMILIES if family.network.name == network), None)
    if family is None or (engine != BRIDGE and family.nemo_model is None):
        raise _refusal(folder, f"model of {network_key(config)}", engine)
    lora = None
    if config.model.peft.scheme != "none":
        keys = config.model.peft.lora
        kind = {"lora": "LoRA"}.get(config.model.peft.scheme, config.model.peft.scheme)
        lora = {"_target_": kind, "dim": keys.dim, "alpha": keys.alpha, "dropout": keys.dropout}
    return _described(folder, family, architecture_fields(config), lora, tokenizer, config.model.seq_length)


def _of_run(checkpoint: Path, recipe: Path, engine: str) -> Described:
    config = load_recipe(recipe)
    # The tokenizer that the run used, with its config.json; or the copy in the checkpoint.
    assert config.data.tokenizer is not None
    tokenizer, copy = Path(config.data.tokenizer).expanduser(), checkpoint / "context" / "tokenizer"
    folder = copy if not tokenizer.is_dir() and copy.is_dir() else tokenizer
    return describe_run(config, checkpoint, str(folder), engine)


def _of_config(checkpoint: Path, file: Path, engine: str) -> Described:
    given = read_json(file, KEY)
    family = family_of_config(given, file.parent, engine, key=KEY)
    config = read_config(given, family, f"{KEY}: {file}", None)
    fields = {**family.network.fields, **network_fields(config, family), "vocab_size": config.vocab_size}
    return _described(checkpoint, family, fields, None, str(file.parent), config.max_position_embeddings)


def _refusal(checkpoint: Path, kind: str, engine: str) -> UserError:
    return UserError(f"{KEY}: {checkpoint} is a {kind}, which cannot be exported. Only {names_of(engine)} can.")


def _described(
    folder: Path,
    family: Family,
    fields: Mapping[str, Any],
    lora: Mapping[str, Any] | None,
    tokenizer: str,
    seq_length: int,
) -> Described:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    derived = {
        "kv_channels": fields.get("kv_channels") or hidden // heads,
        "num_query_groups": fields.get("num_query_groups") or heads,
    }
    config = SimpleNamespace(**{**fields, **derived})
    return Described(folder, family, config, lora, tokenizer, seq_length)
