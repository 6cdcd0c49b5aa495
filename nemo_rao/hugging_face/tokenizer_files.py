"""What stands beside an exported model's weights: its tokenizer, and how text is generated with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a tokenizer consists of, besides config.json, which tells its class where tokenizer_config.json does not.
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
    """``carried``, the model's own, with an end at the end of a turn and of a text."""
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
        name: its folder, or its name on huggingface.co.
        tokenizer: the same, loaded.
    """
    source = Path(name)
    if not source.is_dir():
        tokenizer.save_pretrained(folder)
        return
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what of a tokenizer's files is in ``source``."""
    for name in TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
