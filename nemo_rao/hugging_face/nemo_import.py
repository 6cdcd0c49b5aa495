"""Import with NeMo's connectors (:mod:`nemo_rao.engines.nemo.hugging_face`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_rao.engines.nemo.hugging_face import Weights, write_checkpoint
from nemo_rao.hugging_face.network import network_fields
from nemo_rao.hugging_face.source import Source
from nemo_rao.hugging_face.source_weights import read_tensors, tensors_of
from nemo_rao.runtime.console import say


def import_weights(source: Source, files: Sequence[Path], folder: Path) -> None:
    """Write ``folder/weights`` and ``folder/context``, a NeMo checkpoint of the model.

    Args:
        files: the weights.
        folder: output directory that already contains ``tokenizer/``.

    Raises:
        UserError: a pickle cannot be read, or tied embeddings differ from the stored output layer.
    """
    family, config = source.family, source.config
    say("reading the weights")
    wanted = tensors_of(config, family)
    assert wanted is not None and family.nemo_model is not None, family
    tensors = read_tensors(files, wanted, tied=config.tie_word_embeddings)
    weights = Weights(tensors, config, qkv_bias=family.qkv_bias, qk_norm=family.qk_norm)
    del tensors
    fields = {
        **family.network.fields,
        **network_fields(config, family),
        "vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
    }
    write_checkpoint(weights, family.nemo_model, family.network.name, fields, folder, source.folder)
