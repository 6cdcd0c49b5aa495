"""``nemo-rao export-hf``: convert a checkpoint to a directory for ``transformers``, or to adapters for ``peft``.

The model is described by text files in the checkpoint (:mod:`nemo_rao.hugging_face.described`). The format of the
weights, torch_dist, contains pickles, which are inspected first (:mod:`nemo_rao.checkpoint.pickles`).

Adapters of a LoRA run are merged, ``W + alpha / dim * B A`` in fp32, into the weights from which the run started, found
by :mod:`nemo_rao.checkpoint.adapters`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from nemo_rao.checkpoint.adapters import base_of_adapters
from nemo_rao.checkpoint.find import check_checkpoint, resolve_checkpoint, stored_tensors
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.data.rendering_record import write_rendering
from nemo_rao.errors import UserError
from nemo_rao.hugging_face import bridge_export, nemo_export
from nemo_rao.hugging_face.adapters import check_adapters, write_adapters
from nemo_rao.hugging_face.checkpoint import SCORE_HEAD
from nemo_rao.hugging_face.conversion import engine_here, on_cpu_alone
from nemo_rao.hugging_face.described import KEY, Described, describe
from nemo_rao.hugging_face.destination import check_destination, written_whole
from nemo_rao.hugging_face.generation_config import read_generation_config
from nemo_rao.hugging_face.network import check_expressible
from nemo_rao.hugging_face.rendering_of_run import rendering_of_run
from nemo_rao.hugging_face.target import Target
from nemo_rao.hugging_face.tokenizer_files import write_tokenizer
from nemo_rao.runtime.console import quiet_imports, quiet_third_parties, say
from nemo_rao.runtime.launch import launch

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_BYTES = {"fp32": 4, "bf16": 2}


def main(arguments: argparse.Namespace) -> int:
    """Export ``arguments.checkpoint`` to ``arguments.dest``.

    Raises:
        UserError: the checkpoint is incomplete or of an unknown family, or the destination cannot be used.
    """
    on_cpu_alone()
    quiet_third_parties()
    engine = engine_here()
    described = describe(resolve_checkpoint(arguments.checkpoint, KEY), engine)
    _check_options(arguments, described)
    base = described.folder if described.lora is None else base_of_adapters(described.folder, KEY, arguments.base)
    from nemo_rao.data.encode import load_tokenizer

    tokenizer = load_tokenizer(described.tokenizer)
    rendering = rendering_of_run(described.folder)
    vocab_size = described.config.vocab_size or len(tokenizer)
    with quiet_imports():
        import megatron.core.dist_checkpointing  # noqa: F401  # used by the check

        check_expressible(vars(described.config), described.family, f"{KEY}: {described.folder}")
    if not arguments.allow_pickle:
        for folder in {base, described.folder}:
            refuse_code(folder, KEY)
    remedy = "the weights do not belong to the model described in the checkpoint"
    check_checkpoint(base, described.config, vocab_size, key=KEY, remedy=remedy, trusted=True)
    if engine != BRIDGE:
        nemo_export.check_names(described, base)
    if described.lora is not None:
        check_adapters(described)
    generation, changed = read_generation_config(Path(described.tokenizer), KEY)
    for line in changed:
        say(line)

    tensors = stored_tensors(described.folder if arguments.adapters else base, trusted=True)
    stored = {dtype for _, dtype in tensors.values()}
    dtype = arguments.dtype or ("bf16" if stored == {"bfloat16"} else "fp32")
    num_bytes = sum(math.prod(shape) for shape, _ in tensors.values()) * _BYTES[dtype]
    destination = check_destination(arguments.dest, num_bytes, "DEST")
    with written_whole(destination, "DEST") as partial:
        if arguments.adapters:
            write_adapters(described, partial, _DTYPES[dtype], vocab_size)
        else:
            write_model = (bridge_export if engine == BRIDGE else nemo_export).write_model
            launch(write_model, (described, base, Target(partial, _DTYPES[dtype], vocab_size, generation)), num_ranks=1)
        write_tokenizer(described.tokenizer, tokenizer, partial)
        if rendering is not None:
            write_rendering(partial, rendering)
    if arguments.adapters:
        say(f"adapters  {destination}")
        say(f'to load   peft.PeftModel.from_pretrained(model, "{destination}") with the base model of the run')
    else:
        kind = "SequenceClassification" if SCORE_HEAD in tensors else "CausalLM"
        say(f"model    {destination}")
        say(f'to load  transformers.AutoModelFor{kind}.from_pretrained("{destination}")')
    return 0


def _check_options(arguments: argparse.Namespace, described: Described) -> None:
    if described.lora is not None:
        return
    if arguments.adapters:
        raise UserError(
            f"--adapters: {described.folder} is a full model without adapters. Leave the option out, or pass a run "
            "with model.peft.scheme=lora."
        )
    if arguments.base:
        raise UserError(f"--base: {described.folder} is a full model without adapters. Leave the option out.")
