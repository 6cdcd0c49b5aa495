"""The model to export: its config.json, which does not depend on the engine that converts the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.hugging_face.described import KEY, Described
from nemo_rao.hugging_face.network import transformers_config
from nemo_rao.model_files.config_json import read_json


@dataclass(frozen=True)
class Target:
    """Output of an export.

    Attributes:
        folder: existing, empty directory.
        dtype: torch name of the dtype of the tensors.
        vocab_size: rows of the embeddings, without Megatron's padding.
        generation: the model's generation_config.json.
    """

    folder: Path
    dtype: str
    vocab_size: int
    generation: Mapping[str, Any] | None


def target_config(described: Described, target: Target, tokenizer: Any, *, tied: bool) -> Any:
    """Build transformers' config of the exported model. Keys that are not part of the network are taken from the
    config.json next to the tokenizer, if that belongs to the same model.

    Args:
        tied: whether input and output embeddings are one matrix.

    Raises:
        UserError: transformers rejects the values.
    """
    file = Path(described.tokenizer) / "config.json"
    carried: dict[str, Any] = {}
    if file.is_file():
        found = read_json(file, KEY)
        same = {"model_type": described.family.model_type, "hidden_size": described.config.hidden_size}
        carried = found if {key: found.get(key) for key in same} == same else {}
    config = transformers_config(
        {**vars(described.config), "share_embeddings_and_output_weights": tied},
        described.family,
        vocab_size=target.vocab_size,
        seq_length=described.seq_length,
        carried=carried,
        location=f"{KEY}: {file if carried else described.folder}",
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return config


def make_classifier(config: Any, num_labels: int, tokenizer: Any) -> None:
    """Turn the config of a causal language model into that of a sequence classifier with one label per score of the
    head, whose logits are the scores.
    """
    from nemo_rao.data.encode import end_tokens

    config.architectures = [name.replace("CausalLM", "SequenceClassification") for name in config.architectures]
    config.num_labels = num_labels
    # The classifier reads the last token that is not padding. If the end token is also the pad token, it can only
    # score one row at a time.
    config.pad_token_id = None if tokenizer.pad_token_id in end_tokens(tokenizer) else tokenizer.pad_token_id
