"""Text to token ids, and the tokens at the beginning and end of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WHOLE = {"split_special_tokens": False}


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without those that the tokenizer adds at its ends. Fast tokenizers use several threads.

    Special tokens in the text become single tokens even if the tokenizer's ``split_special_tokens`` is set: the markers
    of a chat template would otherwise be spelled out letter by letter.
    """
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **_WHOLE if tokenizer.split_special_tokens else {},
    )
    return [list(ids) for ids in batch["input_ids"]]


def beginning_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before plain text."""
    text = "Plain text."
    (bare,) = token_ids(tokenizer, [text])
    full = tokenizer(text, add_special_tokens=True, **_WHOLE if tokenizer.split_special_tokens else {})["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def end_of_text(tokenizer: PreTrainedTokenizerBase, complaint: str) -> int:
    """Id of the tokenizer's end token.

    Raises:
        UserError: it has none; ``complaint`` is the message.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name_of(tokenizer)}: {complaint}. Set its eos_token.")
    return int(tokenizer.eos_token_id)


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id for padding: the tokenizer's pad token, else its end token, else 0. The model never attends to it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special and other added tokens by id, without the runs of spaces that some vocabularies include."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    added.update(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
    return {number: text for number, text in added.items() if text.strip()}


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of the tokens that follow a prompt, including special tokens.

    They are decoded after the prompt, since some tokenizers drop a space at the beginning of a text.

    Raises:
        UserError: the tokenizer does not decode to text.
    """
    before, whole = _decoded(tokenizer, [*prompt]), _decoded(tokenizer, [*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, [*tokens])


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(
        tokens,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
        spaces_between_special_tokens=False,  # only slow tokenizers use this
    )
    if not isinstance(text, str):
        raise UserError(f"tokenizer {name_of(tokenizer)}: does not decode to text. Use another tokenizer.")
    return text
