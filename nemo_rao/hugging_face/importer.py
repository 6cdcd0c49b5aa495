"""``nemo-rao import-hf``: convert a Hugging Face model to a checkpoint, a tokenizer, and a recipe's model group.

    DEST/weights                  the checkpoint: model.restore_from_path=DEST; NeMo adds its own DEST/context
    DEST/tokenizer                tokenizer, chat template, config.json: data.tokenizer=DEST/tokenizer
    DEST/model/imported.yaml      sizes and both paths: --config-dir DEST model=imported, with any recipe

Every key of config.json is used, known to be harmless, or rejected (:mod:`nemo_rao.hugging_face.config_keys`). Weights
are read from safetensors, whose headers are first checked against config.json for missing, misshapen, truncated and
extra tensors. The model's code is never run.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.errors import UserError
from nemo_rao.hugging_face import bridge_import, nemo_import
from nemo_rao.hugging_face.config_keys import notes
from nemo_rao.hugging_face.conversion import engine_here, on_cpu_alone
from nemo_rao.hugging_face.destination import check_destination, written_whole
from nemo_rao.hugging_face.generation_config import GENERATION, read_generation_config
from nemo_rao.hugging_face.network import model_keys
from nemo_rao.hugging_face.source import KEY, Source, find_source
from nemo_rao.hugging_face.source_weights import check_tensors, tensors_of
from nemo_rao.hugging_face.tokenizer_files import copy_tokenizer
from nemo_rao.model_files.weights import Header, read_headers, weight_files
from nemo_rao.runtime.console import quiet_third_parties, say
from nemo_rao.runtime.launch import launch

_LONGEST = 4096  # tokens; a recipe's model.seq_length is the model's own length, or this


def main(arguments: argparse.Namespace) -> int:
    """Import ``arguments.source`` into ``arguments.dest``.

    Raises:
        UserError: it is not a complete model of a known family, or the destination cannot be used.
    """
    on_cpu_alone()
    quiet_third_parties()
    engine = engine_here()
    source = find_source(
        arguments.source, engine=engine, allow_pickle=arguments.allow_pickle, ignored=arguments.ignore_key
    )
    folder, family, config = source.folder, source.family, source.config
    generation, changed = read_generation_config(folder, KEY)
    files = weight_files(folder, KEY, allow_pickle=arguments.allow_pickle)
    headers = read_headers(folder, files, KEY)
    if engine == BRIDGE:
        bridge_import.check_scaling(config, family, folder)
    wanted = tensors_of(config, family)
    if headers:
        stored = {name: one for header in headers.values() for name, one in header.tensors.items()}
        check_tensors(stored, wanted, folder)
    destination = check_destination(arguments.dest, sum(file.stat().st_size for file in files), "DEST")

    from nemo_rao.data.encode import load_tokenizer

    num_tokens = len(load_tokenizer(folder))
    if num_tokens > config.vocab_size:
        raise UserError(
            f"{KEY}: the tokenizer in {folder} has {num_tokens} tokens, more than the {config.vocab_size} rows of the "
            "model's embeddings. Use the model's own tokenizer."
        )
    keys = model_keys(config, family)
    say(f"{family.architecture}{_size(headers, wanted)} in {len(files)} files of {folder}")
    for line in [*notes(source.given, family), *changed]:
        say(line)
    with written_whole(destination, "DEST") as partial:
        _copy_tokenizer(source, partial / "tokenizer", arguments.source, generation)
        import_weights = (bridge_import if engine == BRIDGE else nemo_import).import_weights
        launch(import_weights, (source, files, partial), num_ranks=1)
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


def _size(headers: Mapping[Path, Header], wanted: Mapping[str, tuple[int, ...]] | None) -> str:
    """`` of N parameters``, counted from the config or the files' headers."""
    shapes = [shape for header in headers.values() for _, shape in header.tensors.values()]
    number = sum(math.prod(shape) for shape in (shapes if wanted is None else wanted.values()))
    return f" of {number:,} parameters" if number else ""


def _recipe(destination: Path, keys: Mapping[str, Any], config: Any, num_tokens: int) -> str:
    """Content of a file of the group ``model``."""
    from nemo_rao.config.recipe_text import shown

    arch = dict(keys["arch"])
    # If omitted, it is the tokenizer's size, padded by Megatron as its parallelism requires.
    vocab_size = {} if num_tokens == config.vocab_size else {"vocab_size": config.vocab_size}
    extra = {**arch.pop("extra"), **vocab_size}
    lines = [
        "# @package _global_",
        "# Written by nemo-rao import-hf. For any recipe: --config-dir "
        f"{shlex.quote(str(destination))} model=imported. The two paths below are",
        "# absolute: change them if this directory is moved.",
        "model:",
        f"  restore_from_path: {shown(str(destination))}",
        f"  family: {keys['family']}",
        f"  seq_length: {min(config.max_position_embeddings, _LONGEST)}",
        "  arch:",
        *(f"    {name}: {shown(value)}" for name, value in arch.items()),
        *(["    extra:"] if extra else []),  # an empty mapping would be null
        *(f"      {name}: {shown(value)}" for name, value in extra.items()),
        "data:",
        f"  tokenizer: {shown(str(destination / 'tokenizer'))}",
    ]
    return "\n".join(lines) + "\n"


def _copy_tokenizer(source: Source, folder: Path, name: str, generation: Mapping[str, Any] | None) -> None:
    """Copy the tokenizer into a separate directory, which NeMo copies into every checkpoint."""
    from nemo_rao.data.tokenizer import save_for_4, written_by_5

    folder.mkdir()
    copy_tokenizer(source.folder, folder)
    if written_by_5(str(folder)):
        save_for_4(str(folder), folder)
    kept = {key: value for key, value in source.given.items() if key != "auto_map"}
    (folder / "config.json").write_text(json.dumps({**kept, "_name_or_path": name}, indent=2) + "\n")
    if generation is not None:
        (folder / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
