"""Samples as text, for scorers and for people."""

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
        tokenizer: of Hugging Face.
        prompts: the run's prompts as text, without responses.

    Attributes:
        end_tokens: what ends a response.

    Raises:
        UserError: nothing ends one.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Row]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.end_tokens = end_tokens(tokenizer)

    def row(self, held: RolloutData, slot: int) -> Row:
        """A slot's prompt with its K responses, without their end tokens; those that were cut are marked so."""
        assert held.rollout is not None, "nothing has been sampled yet"
        number = int(held.rollout.prompts[slot])
        prompt = held.prompt(number).tolist()
        responses = []
        for tokens, is_cut in zip(held.rollout.responses(slot), held.rollout.is_cut[slot], strict=True):
            own = tokens.tolist()
            text = text_behind(self._tokenizer, prompt, own if is_cut else own[:-1])
            responses.append(Response(text.rstrip("\ufffd") if is_cut else text, truncated=bool(is_cut)))
        return replace(self._prompts[number], responses=tuple(responses))
