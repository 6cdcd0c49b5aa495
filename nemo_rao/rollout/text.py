"""Decoding of samples to text, for scorers and for inspection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_rao.batch import Response, Row
from nemo_rao.data.encode import end_tokens
from nemo_rao.data.tokens import text_behind
from nemo_rao.rollout.samples import RolloutData


class SampleText:
    """Decodes the current rollout into rows of text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: prompts of the run as text, without responses.

    Attributes:
        end_tokens: tokens that end a response.

    Raises:
        UserError: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Row]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.end_tokens = end_tokens(tokenizer)

    def row(self, held: RolloutData, slot: int) -> Row:
        """A slot's prompt with its K responses, without end tokens; responses that were cut are marked as truncated."""
        assert held.rollout is not None, "nothing has been sampled yet"
        number = int(held.rollout.prompts[slot])
        prompt = held.prompt(number).tolist()
        responses = []
        for tokens, is_cut in zip(held.rollout.responses(slot), held.rollout.is_cut[slot], strict=True):
            own = tokens.tolist()
            text = text_behind(self._tokenizer, prompt, own if is_cut else own[:-1])
            responses.append(Response(text.rstrip("\ufffd") if is_cut else text, truncated=bool(is_cut)))
        return replace(self._prompts[number], responses=tuple(responses))
