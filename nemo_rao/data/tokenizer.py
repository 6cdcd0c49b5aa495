"""Loading of tokenizers in the format of transformers 4 or 5."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nemo_rao.data.template import Template
from nemo_rao.data.tokens import end_of_text
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Class that transformers 5 records for any tokenizer.json; transformers 4 has it under another name.
FAST_CLASS_OF_5 = "TokenizersBackend"
_BYTE_LEVEL = "ByteLevel"
OTHER_CLASSES_OF_5 = ("SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer from a local directory or by name. Remote code is never run.

    Raises:
        UserError: it cannot be loaded, or neither it nor its chat template has an end token.
    """
    name = os.path.expanduser(os.fspath(path))
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(
            f"tokenizer {name}: no such directory. Pass a directory with a Hugging Face tokenizer, or a name."
        )
    try:
        tokenizer = _load(name)
    except UserError:
        raise
    except Exception as error:  # many kinds: network, access, damaged files, an unknown class
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {reason}). Pass a directory with a Hugging "
            "Face tokenizer (tokenizer.json, tokenizer_config.json) or the name of one."
        ) from None
    if tokenizer.eos_token_id is None:
        if tokenizer.chat_template is None:
            end_of_text(tokenizer, "has no end token")
        Template(tokenizer)  # raises unless the chat template has an end of turn
    return tokenizer


def _load(name: str) -> PreTrainedTokenizerBase:
    import transformers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = _config_of_5(name)
    kind = config.get("tokenizer_class")
    if kind in OTHER_CLASSES_OF_5:
        raise UserError(
            f"tokenizer {name}: tokenizer_config.json names the class {kind}, which transformers 5 saved and "
            f"transformers {transformers.__version__} does not have. Save it as a fast tokenizer (tokenizer.json)."
        )
    arguments = _as_in_4(config)
    if not _is_of_no_model(kind, name):
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **arguments)
        if not _loses_bytes(name, loaded):
            return loaded
    with _without_warnings("transformers.tokenization_utils_base"):  # about the class's other name
        return PreTrainedTokenizerFast.from_pretrained(name, **arguments)


def _is_of_no_model(kind: str | None, name: str) -> bool:
    """Whether the tokenizer is a plain tokenizer.json, without a model-specific class.

    Transformers 5 nevertheless uses the class of some models (Qwen2's) and adds that model's special tokens.
    """
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if int(transformers.__version__.split(".")[0]) < 5:
        return kind == FAST_CLASS_OF_5
    return get_tokenizer_config(name).get("tokenizer_class") in (FAST_CLASS_OF_5, "PreTrainedTokenizerFast")


def _loses_bytes(name: str, loaded: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's class has replaced the byte-level pre-tokenizer of tokenizer.json.

    LlamaTokenizer of transformers 5 does so (https://github.com/huggingface/transformers/issues/45488), and models such
    as DeepSeek-R1-Distill-Llama name that class: text would lose its spaces.
    """
    import transformers
    from transformers.utils import cached_file

    if int(transformers.__version__.split(".")[0]) < 5 or not loaded.is_fast:
        return False
    file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None or _BYTE_LEVEL in repr(loaded.backend_tokenizer.pre_tokenizer):
        return False
    with open(file, encoding="utf-8") as opened:
        return _BYTE_LEVEL in json.dumps(json.load(opened).get("pre_tokenizer"))


def written_by_5(name: str) -> bool:
    """Whether transformers 5 wrote the tokenizer in a form that the loaders of transformers 4 reject."""
    return bool(_config_of_5(name))


def save_for_4(name: str, folder: str | os.PathLike[str]) -> None:
    """Save the tokenizer in a form that the loaders of transformers 4, which other libraries call, accept."""
    load_tokenizer(name).save_pretrained(folder)


def _config_of_5(name: str) -> dict[str, Any]:
    """tokenizer_config.json, if its form is new in transformers 5 and unknown to the installed version."""
    import transformers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if int(transformers.__version__.split(".")[0]) >= 5:
        return {}
    config: dict[str, Any] = get_tokenizer_config(name)
    new_class = config.get("tokenizer_class") in (FAST_CLASS_OF_5, *OTHER_CLASSES_OF_5)
    new_names = isinstance(config.get("extra_special_tokens"), list) or "model_specific_special_tokens" in config
    return config if new_class or new_names else {}


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _as_in_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that translate transformers 5's spelling of extra special tokens into that of transformers 4.

    A list in ``extra_special_tokens`` corresponds to ``additional_special_tokens``; a dictionary in
    ``model_specific_special_tokens`` (name -> token) is its ``extra_special_tokens``.
    """
    extra, named = config.get("extra_special_tokens"), config.get("model_specific_special_tokens")
    arguments: dict[str, Any] = {}
    if isinstance(extra, list):
        listed = [*(config.get("additional_special_tokens") or []), *extra]
        arguments["additional_special_tokens"] = [_token(token) for token in listed]
        arguments["extra_special_tokens"] = {}
    if isinstance(named, dict):
        arguments["extra_special_tokens"] = {key: _token(token) for key, token in named.items()}
    return arguments


def _token(given: Any) -> Any:
    """A token from tokenizer_config.json, given as text or as an object that describes it."""
    from tokenizers import AddedToken

    if not isinstance(given, dict):
        return given
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(given["content"], **{flag: given[flag] for flag in flags if flag in given})
