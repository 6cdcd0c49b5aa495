"""Files next to an exported model's weights: its tokenizer and generation config."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Files of a tokenizer, besides config.json, which determines its class if tokenizer_config.json does not.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def generation_config(carried: Mapping[str, Any], tokenizer: Any) -> Any:
    """The model's own settings (``carried``), with the end of turn and the end of text as end tokens."""
    from transformers import GenerationConfig

    from nemo_rao.data.encode import end_tokens

    ends = end_tokens(tokenizer)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig.from_dict({**carried, **tokens})


def write_tokenizer(name: str, tokenizer: Any, folder: Path) -> None:
    """Copy a tokenizer's files into ``folder``.

    Args:
        name: its directory, or its name on huggingface.co.
        tokenizer: the same, loaded.
    """
    source = Path(name)
    if not source.is_dir():
        tokenizer.save_pretrained(folder)
        return
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files that exist in ``source``."""
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
