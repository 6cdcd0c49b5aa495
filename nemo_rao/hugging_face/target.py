"""The model that export writes: its config.json, which is the same whatever converts the weights."""

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
    """What is written.

    Attributes:
        folder: exists, and is empty.
        dtype: of the tensors, torch's name.
        vocab_size: rows of the embeddings, without Megatron's padding.
        generation: the model's generation_config.json.
    """

    folder: Path
    dtype: str
    vocab_size: int
    generation: Mapping[str, Any] | None


def target_config(described: Described, target: Target, tokenizer: Any, *, tied: bool) -> Any:
    """transformers' config of the exported model. The config.json beside the tokenizer adds what is no part of the
    network, where it is of the same model.

    Args:
        tied: input and output embeddings are one matrix.

    Raises:
        UserError: transformers refuses the values.
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
        place=f"{KEY}: {file if carried else described.folder}",
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return config


def make_classifier(config: Any, num_labels: int, tokenizer: Any) -> None:
    """Turn the config of a model that generates into that of a sequence classifier: a label for each of a head's
    scores, the scores its logits.
    """
    from nemo_rao.data.encode import end_tokens

    config.architectures = [name.replace("CausalLM", "SequenceClassification") for name in config.architectures]
    config.num_labels = num_labels
    # It reads the last token that is no padding. Where the end token pads, too, one row at a time is all it can do.
    config.pad_token_id = None if tokenizer.pad_token_id in end_tokens(tokenizer) else tokenizer.pad_token_id
