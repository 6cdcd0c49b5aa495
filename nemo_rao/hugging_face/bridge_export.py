"""``nemo-rao export-hf`` where Megatron-Bridge is installed: a checkpoint becomes a folder that ``transformers`` loads.

What the model is stands in the recipe of the run that wrote the checkpoint; the config.json that stands with the
tokenizer adds what is no part of the network. A checkpoint of no run, as import-hf writes it, has that file alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_rao.checkpoint.adapters import base_of_adapters, holds_adapters
from nemo_rao.checkpoint.find import check_checkpoint, resolve_checkpoint, stored_tensors
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.config.architecture import architecture_fields, family_of
from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.data.rendering_record import write_rendering
from nemo_rao.errors import UserError
from nemo_rao.hugging_face.adapters import changes_output_layer, check_adapters, merge, write_adapters
from nemo_rao.hugging_face.checkpoint import SCORE_HEAD, Described, read_tensors
from nemo_rao.hugging_face.config_keys import read_config
from nemo_rao.hugging_face.conversion import bridge_of_one_rank
from nemo_rao.hugging_face.destination import check_destination, written_whole
from nemo_rao.hugging_face.families import FAMILIES, Family
from nemo_rao.hugging_face.generation_config import read_generation_config
from nemo_rao.hugging_face.network import config_values, network_fields
from nemo_rao.hugging_face.rendering_of_run import rendering_of_run
from nemo_rao.hugging_face.source import family_of as family_of_config
from nemo_rao.hugging_face.tokenizer_files import generation_config, write_tokenizer
from nemo_rao.model_files.config_json import read_json
from nemo_rao.runtime.console import quiet_imports, say
from nemo_rao.runtime.launch import launch

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "bf16": 2}
_KEY = "CHECKPOINT"


def export(arguments: argparse.Namespace) -> int:
    """Exports ``arguments.checkpoint`` to ``arguments.dest``.

    Raises:
        UserError: the checkpoint is not whole or of a family that is not known, or the destination does not suit.
    """
    described, values = describe(resolve_checkpoint(arguments.checkpoint, _KEY))
    if arguments.adapters and described.lora is None:
        raise UserError(
            f"--adapters: {described.folder} has none, it is a whole model; leave the option out, or name a run with "
            "model.peft.scheme=lora"
        )
    if arguments.base and described.lora is None:
        raise UserError(f"--base: {described.folder} has no adapters, it is a whole model; leave the option out")
    base = described.folder
    if described.lora is not None:
        base = base_of_adapters(described.folder, _KEY, arguments.base)
    from nemo_rao.data.encode import load_tokenizer

    tokenizer = load_tokenizer(described.tokenizer)
    rendering = rendering_of_run(described.folder)
    vocab_size = described.config.vocab_size or len(tokenizer)
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  # what the check reads with
    if not arguments.allow_pickle:
        for folder in {base, described.folder}:
            refuse_code(folder, _KEY)
    remedy = "the checkpoint is not of the recipe, or of the config.json, beside it"
    check_checkpoint(base, described.config, vocab_size, key=_KEY, remedy=remedy, trusted=True)
    if described.lora is not None:
        check_adapters(described)
    generation, changed = read_generation_config(Path(described.tokenizer), _KEY)
    for line in changed:
        say(line)

    tensors = stored_tensors(described.folder if arguments.adapters else base, trusted=True)
    dtype = arguments.dtype or ("bf16" if {dtype for _, dtype in tensors.values()} == {"bfloat16"} else "fp32")
    destination = check_destination(arguments.dest, _num_bytes(tensors, dtype), "DEST")
    with written_whole(destination, "DEST") as partial:
        if arguments.adapters:
            write_adapters(described, partial, _DTYPES[dtype], vocab_size)
        else:
            job = (described, base, {**values, "vocab_size": vocab_size}, partial, dtype, generation)
            launch(_write_model, job, num_ranks=1)
        write_tokenizer(described.tokenizer, tokenizer, partial)
        if rendering is not None:
            write_rendering(partial, rendering)
    if arguments.adapters:
        say(f"adapters  {destination}")
        say(f'to load   peft.PeftModel.from_pretrained(model, "{destination}"), model: what the run started from')
    else:
        kind = "SequenceClassification" if SCORE_HEAD in tensors else "CausalLM"
        say(f"model    {destination}")
        say(f'to load  transformers.AutoModelFor{kind}.from_pretrained("{destination}")')
    return 0


def _num_bytes(tensors: Mapping[str, tuple[tuple[int, ...], str]], dtype: str) -> int:
    import math

    return sum(math.prod(shape) for shape, _ in tensors.values()) * _BYTES[dtype]


def describe(checkpoint: Path) -> tuple[Described, dict[str, Any]]:
    """What model ``checkpoint`` has, and the values of its config.json; without reading any pickle.

    Raises:
        UserError: nothing says so, or the model is of a family that cannot be exported.
    """
    recipe = checkpoint.resolve().parent.parent / RECIPE
    if checkpoint.resolve().parent.name == "checkpoints" and recipe.is_file():
        return _of_run(checkpoint, recipe)
    # As import-hf leaves them, and as NeMo does.
    folders = [
        file.parent
        for file in (checkpoint / "tokenizer" / "config.json", *checkpoint.glob("context/*/config.json"))
        if file.is_file()
    ]
    if not folders or holds_adapters(checkpoint):
        raise UserError(
            f"{_KEY}: nothing beside {checkpoint} says what model it is; name a checkpoint in the folder of its run, "
            "or what import-hf wrote"
        )
    file = folders[0] / "config.json"
    given = read_json(file, _KEY)
    family = family_of_config(given, folders[0], BRIDGE)
    config = read_config(given, family, f"{_KEY}: {file}", None)
    fields = {**network_fields(config, family), "vocab_size": config.vocab_size}
    return _described(checkpoint, family, fields, None, str(folders[0])), given


def _of_run(checkpoint: Path, recipe: Path) -> tuple[Described, dict[str, Any]]:
    config = load_recipe(recipe)
    fields, name = architecture_fields(config), family_of(config)
    family = next((family for family in FAMILIES if name is not None and _model_type(name) == family.model_type), None)
    if family is None:
        raise UserError(f"{_KEY}: {recipe}: a model of this kind cannot be exported")
    assert config.data.tokenizer is not None
    tokenizer = str(Path(config.data.tokenizer).expanduser())
    lora = config.model.peft.lora
    keys = {"_target_": "LoRA", "dim": lora.dim, "alpha": lora.alpha, "dropout": lora.dropout}
    described = _described(checkpoint, family, fields, keys if config.model.peft.scheme == "lora" else None, tokenizer)
    carried: dict[str, Any] = {}
    if (file := Path(tokenizer) / "config.json").is_file():
        found = read_json(file, _KEY)
        same = {"model_type": family.model_type, "hidden_size": fields["hidden_size"]}
        carried = found if {key: found.get(key) for key in same} == same else {}
    own = config_values(fields, family)
    longest = max(config.model.seq_length, carried.get("max_position_embeddings") or 0)
    # Either spelling of rotary embeddings may have been carried along; the run's is the recipe's.
    kept = {
        key: value for key, value in carried.items() if key not in ("rope_parameters", "rope_scaling", "rope_theta")
    }
    return described, {**kept, **own, "max_position_embeddings": longest}


def _model_type(family: str) -> str:
    from nemo_rao.config.families import FAMILIES as NETWORKS

    return NETWORKS[family].model_type


def _described(
    folder: Path, family: Family, fields: Mapping[str, Any], lora: Mapping[str, Any] | None, tokenizer: str
) -> Described:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    derived = {
        "kv_channels": fields.get("kv_channels") or hidden // heads,
        "num_query_groups": fields.get("num_query_groups") or heads,
        # Of a mixture, the width of an expert is not that of the layers that are checked.
        "ffn_hidden_size": None if fields.get("num_moe_experts") else fields.get("ffn_hidden_size"),
    }
    config = SimpleNamespace(**{**fields, **derived})
    return Described(folder=folder, family=family, config=config, lora=lora, tokenizer=tokenizer)


def _write_model(
    described: Described,
    base: Path,
    values: Mapping[str, Any],
    folder: Path,
    dtype: str,
    generation: Mapping[str, Any] | None,
) -> None:
    """Of one rank: the checkpoint's weights, with adapters merged into them, as safetensors with a config.json."""
    from nemo_rao.data.encode import end_tokens, load_tokenizer
    from nemo_rao.hugging_face.bridge_import import transformers_config

    family, num_layers, tokenizer = described.family, described.config.num_layers, load_tokenizer(described.tokenizer)
    shapes = stored_tensors(base, trusted=True)
    adapters: dict[str, Any] = {}
    if described.lora is not None:
        say(f"merging the adapters of {described.folder}")
        adapters = read_tensors(described.folder, num_layers)
    config = transformers_config(values, family)
    untied = bool(config.tie_word_embeddings) and changes_output_layer(adapters)
    if untied:
        say("the adapter of the output layer changes it alone: the exported model's embeddings are not tied to it")
        config.tie_word_embeddings = False
    with bridge_of_one_rank():
        import torch

        from nemo_rao.engines.bridge.hugging_face import Conversion, change_weights, load_checkpoint, write_shards

        conversion = Conversion(config, f"{_KEY}: {described.folder}")
        stored = {name for _, name in shapes.values()}
        whole = torch.float32 if adapters or len(stored) > 1 else vars(torch)[next(iter(stored))]
        say("reading the weights")
        chunks = conversion.build(whole)
        load_checkpoint(chunks, base, tied_before=untied)
        if described.lora is not None:
            lora = described.lora
            change_weights(chunks, lambda weights: merge(weights, adapters, lora))
        tensors: Iterable[tuple[str, Any]] = conversion.tensors(chunks)
        written = vars(torch)[_DTYPES[dtype]]
        config.dtype = written
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if SCORE_HEAD in shapes:
            head = read_tensors(base, num_layers, only=[SCORE_HEAD])[SCORE_HEAD]
            tensors = _with_head(tensors, head)
            config.architectures = [family.architecture.replace("CausalLM", "SequenceClassification")]
            config.num_labels = len(head)
            # It reads the last token that is no padding: one row at a time, where the end token pads, too.
            pads = tokenizer.pad_token_id not in end_tokens(tokenizer)
            config.pad_token_id = tokenizer.pad_token_id if pads else None
        say("converting and writing")
        write_shards(tensors, folder, written)
        config.save_pretrained(folder)
        if SCORE_HEAD not in shapes:
            generation_config(generation or {}, tokenizer).save_pretrained(folder)


def _with_head(tensors: Iterable[tuple[str, Any]], head: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a sequence classifier: a label for each of the head's scores."""
    yield from ((name, tensor) for name, tensor in tensors if name != "lm_head.weight")
    yield "score.weight", head
