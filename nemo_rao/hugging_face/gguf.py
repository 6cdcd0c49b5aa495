"""Conversion of a GGUF file to a Hugging Face model: ``python -m nemo_rao.hugging_face.gguf FILE.gguf DEST``.

    DEST/model.safetensors, config.json    weights in fp32, dequantized by transformers
    DEST/tokenizer.json and its configs    built here from the file's tokens, merges and chat template

transformers' own conversion of a GGUF tokenizer is not used (4.57 and 5.12 were tried): for SmolLM2 it makes
``<|im_start|>`` the end token, splits runs of spaces before digits differently from the model, release 4 prepends a
token to every text, and release 4 also saves the whole GGUF file under the name tokenizer.model.

The package ``gguf`` is needed (the extra ``smollm2``). Quantized weights keep the precision of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError, report
from nemo_rao.hugging_face.conversion import on_cpu_alone
from nemo_rao.hugging_face.destination import check_destination, written_whole
from nemo_rao.model_files.config_json import read_json
from nemo_rao.runtime.console import say

KEY = "FILE"
_CONTROL = 3  # GGUF's token type of special tokens
# Ids of special tokens in the file -> their names in a tokenizer.
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_BYTES_PER_BYTE = 8  # a tensor of 4 bits becomes one of 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_rao.hugging_face.gguf",
        description="Convert a GGUF file to a Hugging Face model in fp32, for nemo-rao import-hf.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="model in GGUF format")
    parser.add_argument("dest", metavar="DEST", help="directory to create")
    given = parser.parse_args(argv)
    try:
        convert(Path(given.file).expanduser(), given.dest)
    except UserError as error:
        return report(error)
    return 0


def convert(file: Path, dest: str) -> None:
    """Write the model in ``file`` to the directory ``dest``, atomically.

    Raises:
        UserError: the file cannot be read or has a tokenizer that is not supported, ``dest`` exists or is too small,
            or the package ``gguf`` is missing.
    """
    on_cpu_alone()
    fields = read_fields(file)
    tokenizer = make_tokenizer(fields, file)
    folder = check_destination(dest, _BYTES_PER_BYTE * file.stat().st_size, "DEST")
    with written_whole(folder, "DEST") as partial:
        model = _load_model(file)
        # The file has them in fp32, as 9.999999747378752e-06.
        model.config.rms_norm_eps = _shortest(model.config.rms_norm_eps)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _name_class_of_4(partial / "tokenizer_config.json")
    say(f"{folder}: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens")


def read_fields(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, such as ``tokenizer.ggml.tokens``.

    Raises:
        UserError: it is not a GGUF file, or ``gguf`` is missing.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"{KEY}: reading {file} needs the package gguf. Run make smollm2, or pip install 'nemo-rao[smollm2]'."
        ) from None
    try:
        reader = GGUFReader(file)
    except OSError as error:
        raise UserError(f"{KEY}: {file}: cannot be read ({error.strerror or error}). Pass a GGUF file.") from None
    except Exception as error:  # a damaged file: numpy's errors and the package's own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{KEY}: {file}: not a complete GGUF file ({reason}). Download it again.") from None
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def make_tokenizer(fields: Mapping[str, Any], file: Path) -> Any:
    """The tokenizer that a GGUF file describes, with its chat template, as a ``PreTrainedTokenizerFast``.

    Args:
        fields: see :func:`read_fields`.
        file: for errors.

    Raises:
        UserError: it is not a byte-level BPE with a known pre-tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    # Name in GGUF -> how text is split before it is merged to tokens.
    splits = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    }
    if kind != "gpt2" or pre not in splits:
        raise UserError(
            f"{KEY}: {file}: has the tokenizer {kind} / {pre}, which is not supported (gpt2 / {', '.join(splits)} is). "
            "Use the Hugging Face model that it was made from."
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(splits[pre])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type in zip(tokens, types, strict=True)
            if type == _CONTROL
        ]
    )
    named = {
        ours: tokens[number]
        for theirs, ours in _SPECIAL.items()
        if (number := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # a Llama's generate refuses token_type_ids
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        **named,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _load_model(file: Path) -> Any:
    """The model in fp32, in Hugging Face's layout.

    Raises:
        UserError: transformers cannot read it, or would initialize missing weights randomly.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of weights that are missing, which are an error here
    try:
        model, found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, output_loading_info=True)
    except Exception as error:  # an unknown architecture or quantization, each with its own exception
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{KEY}: {file}: transformers cannot read it ({type(error).__name__}: {reason})") from None
    if missing := sorted(set(found["missing_keys"]) - set(model._tied_weights_keys or ())):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"{KEY}: {file}: lacks {missing[0]}{others}. Pass a complete model.")
    return model.float()


def _shortest(value: float) -> float:
    """The number with the fewest digits that rounds to the same fp32 value."""
    import numpy as np

    return float(str(np.float32(value)))


def _name_class_of_4(file: Path) -> None:
    """Replace the tokenizer class that transformers 5 writes by one that both 4 and 5 have."""
    config = read_json(file, KEY)
    file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
