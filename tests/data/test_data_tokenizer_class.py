"""A tokenizer splits text as its tokenizer.json says, whatever class tokenizer_config.json names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from nemo_rao.data.tokenizer import load_tokenizer

TEXTS = ("The quick brown fox\n\n  jumps over 12 dogs.", " leading, trailing ", "système ünder 日本")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_byte_level_tokenizer_keeps_its_spaces(tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": name}))
    if name == "PreTrainedTokenizerFast":
        (folder / "config.json").write_text('{"model_type": "qwen2"}')  # of which transformers 5 has a class
    loaded, wanted = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    if name == "PreTrainedTokenizerFast":
        assert len(loaded) == wanted.get_vocab_size()
    for text in TEXTS:
        tokens = loaded.encode(text, add_special_tokens=False)
        assert tokens == wanted.encode(text, add_special_tokens=False).ids
        assert loaded.decode(tokens, clean_up_tokenization_spaces=False) == text
