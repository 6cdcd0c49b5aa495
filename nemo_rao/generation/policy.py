"""A policy with text in and text out: model directory, tokenizer, template and engine.

prompt -> (chat template, as in training) -> tokens -> (engine) -> tokens -> text

Special tokens within an answer, such as ``[TOOL_CALLS]`` or ``<think>``, are part of it and stay in the text; the end
token does not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_rao.batch import Response, Row
from nemo_rao.data.encode import load_tokenizer, pad_token_id
from nemo_rao.data.rendering_record import read_rendering
from nemo_rao.data.tokens import text_behind
from nemo_rao.errors import UserError
from nemo_rao.generation.engine import Continuation, Engine, Request
from nemo_rao.generation.model_folder import (
    check_folder,
    context_length,
    fingerprint,
    read_configuration,
    stop_tokens,
)
from nemo_rao.generation.open_engine import choose_engine, open_engine
from nemo_rao.generation.settings import PolicySettings
from nemo_rao.rows.fields import Messages

EMPTY = "empty"


@dataclass(frozen=True)
class Question:
    """A prompt to be answered once.

    Attributes:
        content: messages or plain text.
        location: where it came from, for messages.
        stream: see :class:`nemo_rao.generation.engine.Request`.
        temperature: sampling temperature of the answer.
        template_fields: see :class:`nemo_rao.batch.Row`.
        plain_prompt: see :class:`nemo_rao.batch.Row`.
    """

    content: str | Messages
    location: str
    stream: tuple[int, ...]
    temperature: float
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    plain_prompt: str | None = None

    def row(self, *responses: Response) -> Row:
        """The prompt with these responses, as a row for training."""
        return Row(
            self.content,
            responses,
            self.location,
            template_fields=self.template_fields,
            plain_prompt=self.plain_prompt,
        )


@dataclass(frozen=True)
class Answer:
    """An answer of the policy.

    Attributes:
        text: includes the special tokens that are part of it.
        num_tokens: number of tokens without the end token.
        cut: whether it reached the maximum length before it ended.
        has_special_tokens: whether the text contains special tokens.
    """

    text: str
    num_tokens: int
    cut: bool
    has_special_tokens: bool


class Policy:
    """A policy loaded from a model directory.

    The constructor checks all files; weights are loaded on the first :meth:`answer`.

    Args:
        folder: directory in Hugging Face's format, with safetensors.
        settings: sampling and rendering settings.

    Attributes:
        engine_name: name of the sampling engine.
        fingerprint: digest that identifies the model.
        rendering: rendering used in training, if the directory records it, with the settings' overrides.
        encoder: renders prompts accordingly.
        notes: lines for the user, such as differences between ``rendering`` and training.

    Raises:
        UserError: the directory, its tokenizer, or the settings cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: PolicySettings) -> None:
        self.folder = check_folder(folder)
        self.settings = settings
        self.engine_name = choose_engine(settings.engine)
        if self.engine_name == "transformers":  # vLLM has its own model implementations
            read_configuration(self.folder)
        self.fingerprint = fingerprint(self.folder)
        self._context = context_length(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.rendering, differences = settings.rendering(read_rendering(self.folder))
        self.encoder = self.rendering.encoder(self.tokenizer)
        self.notes = (*differences, *self.encoder.notes)
        if settings.template_arguments and not self.encoder.uses_template:
            raise UserError("template_arguments: the tokenizer has no chat template to pass them to. Leave them out.")
        self._stop = {self.encoder.end_token_id} | stop_tokens(self.folder)
        if self.tokenizer.eos_token_id is not None:
            self._stop.add(int(self.tokenizer.eos_token_id))

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine; loads the weights on first access."""
        padding = pad_token_id(self.tokenizer)
        return open_engine(self.engine_name, self.folder, self.settings, self._stop, len(self.tokenizer), padding)

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[Answer | None]:
        """Sample the answers, in order; ``None`` if a prompt leaves no room in the model's context."""
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

    def check(self, question: Question) -> tuple[str, ...]:
        """Reject, before the weights are loaded, a prompt that the chat template cannot render.

        Returns:
            remarks on the prompt, see :class:`nemo_rao.batch.Sample`.
        """
        return self.encoder.encode(question.row()).remarks

    def prompt_text(self, content: str | Messages, location: str) -> str:
        """Render the prompt, including the generation prompt.

        Raises:
            UserError: the chat template cannot render it.
        """
        return self.encoder.prompt_text(Row(content, (), location))

    def problem_of(self, question: Question, answer: Answer) -> str | None:
        """Check whether training could read the answer. A missing token boundary to its prompt is an example.

        An answer that was cut only needs text: it is marked, and training drops it by default.

        Returns:
            :data:`EMPTY` for an answer without text, a line about another problem, or ``None`` if it can be read.
        """
        if not answer.text.strip():
            return EMPTY
        if answer.cut:
            return None
        problem = self.encoder.encode_many([question.row(Response(answer.text))])[0]
        return self.settings.OPTIONS(str(problem)) if isinstance(problem, UserError) else None

    def _tokens(self, question: Question) -> np.ndarray:
        # A row without responses: only the prompt, including the generation prompt.
        return self.encoder.encode(question.row()).prompt

    @functools.cached_property
    def _special(self) -> set[int]:
        """All special tokens of the tokenizer, with or without a role such as eos."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {number for number, token in added if token.special} | set(self.tokenizer.all_special_ids)

    def _answer(self, prompt: np.ndarray, generated: Continuation) -> Answer:
        tokens = [token for token in generated.tokens if token != self.tokenizer.pad_token_id]
        text = text_behind(self.tokenizer, prompt.tolist(), tokens)
        if generated.cut:
            text = text.rstrip("\ufffd")  # an incomplete character
        return Answer(text, len(generated.tokens), generated.cut, not self._special.isdisjoint(tokens))
