"""Export with Megatron-Bridge.

weights/  --engines/bridge/hugging_face.py-->  *.safetensors
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import stored_tensors
from nemo_rao.hugging_face.adapters import keeps_tie, merge
from nemo_rao.hugging_face.bridge_conversion import bridge_of_one_rank
from nemo_rao.hugging_face.checkpoint import SCORE_HEAD, read_tensors, report_left_behind
from nemo_rao.hugging_face.described import KEY, Described
from nemo_rao.hugging_face.source_weights import OUTPUT
from nemo_rao.hugging_face.target import Target, make_classifier, target_config
from nemo_rao.hugging_face.tokenizer_files import generation_config
from nemo_rao.runtime.console import say

_EXPORTED = ("embedding", "decoder", "output_layer")  # heads are not exported


def write_model(described: Described, base: Path, target: Target) -> None:
    """Write config.json and the weights, with adapters merged, as safetensors. Runs on one rank.

    Args:
        base: checkpoint with the weights, or the base weights of the adapters of ``described``.

    Raises:
        UserError: the checkpoint lacks tensors of the model, or Bridge does not support the model.
    """
    from nemo_rao.data.encode import load_tokenizer

    tokenizer, num_layers = load_tokenizer(described.tokenizer), described.config.num_layers
    shapes = stored_tensors(base, trusted=True)
    report_left_behind(name for name in shapes if name.partition(".")[0] not in _EXPORTED)
    adapters: dict[str, Any] = {}
    if described.lora is not None:
        say(f"merging the adapters of {described.folder}")
        adapters = read_tensors(described.folder, num_layers)
    tied = keeps_tie(described, adapters)
    config = target_config(described, target, tokenizer, tied=tied)
    with bridge_of_one_rank():
        import torch

        from nemo_rao.engines.bridge.hugging_face import Conversion, change_weights, load_checkpoint, write_shards

        conversion = Conversion(config, f"{KEY}: {described.folder}")
        stored = {name for _, name in shapes.values()}
        whole = torch.float32 if adapters or len(stored) > 1 else vars(torch)[next(iter(stored))]
        say("reading the weights")
        chunks = conversion.build(whole)
        load_checkpoint(chunks, base, tied_before=tied < described.config.share_embeddings_and_output_weights)
        if described.lora is not None:
            lora = described.lora
            change_weights(chunks, lambda weights: merge(weights, adapters, lora))
        tensors: Iterable[tuple[str, Any]] = conversion.tensors(chunks)
        written = copy.deepcopy(config)  # Bridge still reads the other one
        written.dtype = vars(torch)[target.dtype]
        if SCORE_HEAD in shapes:
            head = read_tensors(base, num_layers, only=[SCORE_HEAD])[SCORE_HEAD]
            tensors = _with_head(tensors, head)
            make_classifier(written, len(head), tokenizer)
        else:
            generation_config(target.generation or {}, tokenizer).save_pretrained(target.folder)
        say("converting and writing")
        write_shards(tensors, target.folder, written.dtype)
        written.save_pretrained(target.folder)


def _with_head(tensors: Iterable[tuple[str, Any]], head: Any) -> Iterator[tuple[str, Any]]:
    """Weights of a sequence classifier: the output layer replaced by the head."""
    yield from ((name, tensor) for name, tensor in tensors if name != OUTPUT)
    yield "score.weight", head
