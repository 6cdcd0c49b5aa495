"""A policy that is asked in text and answers in text: folder, tokenizer, template, engine.

prompt -> (chat template, as in training) -> tokens -> (engine) -> tokens -> text without special tokens
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_rao.batch import Response, Row, Sample
from nemo_rao.data.encode import Encoder, load_tokenizer, pad_token_id
from nemo_rao.data.fields import Messages
from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Continuation, Engine, Request, choose_engine, open_engine
from nemo_rao.generation.model_folder import (
    check_architecture,
    check_folder,
    context_length,
    fingerprint,
    stop_tokens,
)
from nemo_rao.generation.settings import PolicySettings


@dataclass(frozen=True)
class Question:
    """A prompt to be answered once.

    Attributes:
        content: messages or plain text.
        place: where it came from, for messages.
        stream: see :class:`nemo_rao.generation.engine.Request`.
        temperature: of this answer.
    """

    content: str | Messages
    place: str
    stream: tuple[int, ...]
    temperature: float


@dataclass(frozen=True)
class Answer:
    """What the policy said: ``text``, its ``num_tokens`` without the end token, and whether it was ``cut``."""

    text: str
    num_tokens: int
    cut: bool


class Policy:
    """A model in a folder.

    Nothing heavy happens before :meth:`answer`, but everything that can be wrong with the folder's files is found.

    Args:
        folder: in Hugging Face's format, with safetensors.
        settings: how it is asked.

    Attributes:
        engine_name: what generates.
        fingerprint: tells this model from others.
        encoder: renders prompts as in training.

    Raises:
        UserError: the folder, its tokenizer, or the settings cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: PolicySettings) -> None:
        self.folder = check_folder(folder)
        self.settings = settings
        self.engine_name = choose_engine(settings.engine)
        if self.engine_name == "transformers":  # vLLM has models of its own
            check_architecture(self.folder)
        self.fingerprint = fingerprint(self.folder)
        self._context = context_length(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.encoder = Encoder(self.tokenizer, chat_template=settings.chat_template)
        self._stop = {self.encoder.end_token_id} | stop_tokens(self.folder)
        if self.tokenizer.eos_token_id is not None:
            self._stop.add(int(self.tokenizer.eos_token_id))

    @functools.cached_property
    def engine(self) -> Engine:
        """Loads the weights when it is first asked for."""
        padding = pad_token_id(self.tokenizer)
        return open_engine(self.engine_name, self.folder, self.settings, self._stop, len(self.tokenizer), padding)

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer | None]:
        """The policy's answers, in order; ``None`` where the prompt leaves no room in the model's context."""
        prompts = [self._tokens(question) for question in questions]
        rooms = [max_new_tokens if self._context is None else self._context - len(tokens) for tokens in prompts]
        requests = [
            Request(tokens, question.stream, min(max_new_tokens, room), question.temperature)
            for question, tokens, room in zip(questions, prompts, rooms, strict=True)
            if room > 0
        ]
        continuations = iter(self.engine.generate(requests) if requests else [])
        return [
            self._answer(tokens, next(continuations)) if room > 0 else None
            for tokens, room in zip(prompts, rooms, strict=True)
        ]

    def check(self, question: Question) -> None:
        """Refuse, before the weights are loaded, a prompt that the chat template does not take."""
        self._tokens(question)

    def can_be_trained_on(self, question: Question, answer: Answer) -> bool:
        """Whether training could read the answer: it has text, and a boundary in tokens to its prompt."""
        if not answer.text.strip():
            return False
        row = Row(question.content, (Response(answer.text),), question.place)
        return isinstance(self.encoder.encode_many([row])[0], Sample)

    def _tokens(self, question: Question) -> np.ndarray:
        # A row without responses: the prompt alone, up to where the policy begins to answer.
        return self.encoder.encode(Row(question.content, (), question.place)).prompt

    def _answer(self, prompt: np.ndarray, said: Continuation) -> Answer:
        """Decoded behind the prompt: some tokenizers drop a blank at the beginning of a text."""
        before, whole = self._text(prompt.tolist()), self._text(prompt.tolist() + said.tokens)
        text = whole[len(before) :] if whole.startswith(before) else self._text(said.tokens)
        if said.cut:
            text = text.rstrip("\ufffd")  # half of a character
        return Answer(text, len(said.tokens), said.cut)

    def _text(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not isinstance(text, str):
            raise UserError(f"tokenizer {self.folder}: does not decode to text; use another tokenizer")
        return text
