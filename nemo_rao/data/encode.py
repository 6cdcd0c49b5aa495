"""Rows to tokens, with an exact boundary between prompt and response.

A row is rendered twice: the prompt alone, up to and including its generation prompt, and the prompt with the answer.
The tokens of the first must be a prefix of the tokens of the second; the rest is the response. If the tokenizer merges
characters across the boundary, no such split exists and the row is rejected: its log-probs would be those of a text
other than the one that the model continues.

The response ends with the end token: the one that the template puts after an answer (its end of turn), or else the
tokenizer's. Anything that a template adds after it ("\\n" in ChatML) is dropped.

    tokenizer   load_tokenizer
    tokens      text -> token ids
    template    the chat template, and the text that it puts around an answer
    content     whether a rendered text contains its messages
    rendering   Row -> text
    dropped     reasons for dropping a row
    encode      Row -> text -> Sample
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from nemo_rao.batch import Row, Sample
from nemo_rao.data.dropped import BoundaryError, ContentError, NothingToLearnError
from nemo_rao.data.rendering import (
    NO_TOKEN,
    Answer,
    Answers,
    ChatRenderer,
    RenderedRow,
    is_conversation,
    render_plain,
)
from nemo_rao.data.rendering_record import ChatTemplate
from nemo_rao.data.template import Template, depends_on_the_day
from nemo_rao.data.tokenizer import load_tokenizer
from nemo_rao.data.tokens import beginning_tokens, end_of_text, name_of, pad_token_id, token_ids
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Answers",
    "BoundaryError",
    "ChatTemplate",
    "ContentError",
    "Encoder",
    "depends_on_the_day",
    "end_tokens",
    "inner_ends",
    "load_tokenizer",
    "pad_token_id",
]


def inner_ends(sample: Sample, end_token_id: int) -> int:
    """Number of the sample's responses that contain the end token inside an answer, before its end."""
    count = 0
    for number, response in enumerate(sample.responses):
        learned = np.ones(len(response), dtype=bool) if sample.answers is None else sample.answers[number]
        edges = np.flatnonzero(np.diff(np.concatenate(([False], learned, [False]))))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            others = np.flatnonzero(response[start:stop] != end_token_id)
            if len(others) and end_token_id in response[start : start + others[-1]]:
                count += 1
                break
    return count


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the chat template's end of turn, then the tokenizer's end token if it differs.

    Raises:
        UserError: there is neither.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    try:
        turn = Encoder(tokenizer).end_token_id
    except UserError:  # unusable for training with this template, but plain text can still be used
        if not ends:
            raise
        return ends
    return [turn, *(end for end in ends if end != turn)]


class Encoder:
    """Encode rows as samples with one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: ``auto``: use the tokenizer's chat template if it has one; a plain-text prompt becomes one user
            message. ``always``: the same, but raise if there is none. ``never``: plain text, unchanged, preceded by
            the beginning token if the tokenizer adds one.
        template_arguments: passed to the chat template (``enable_thinking`` and the like). Llama's ``date_string``
            defaults to the template's own default: with the current date in every prompt, tokens would change daily
            and stored reference log-probs would be useless the day after.
        answers: ``template``: answers are rendered by the chat template. ``verbatim``: an answer's text follows the
            generation prompt unchanged and is followed by the template's end of turn. A block that the generation
            prompt opens (``<think>``) is not opened twice.

    Attributes:
        end_token_id: token that ends every response that is not truncated.
        uses_template: whether prompts are rendered by the chat template.
        notes: peculiarities of the tokenizer or its template, one line each, to be reported once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: ChatTemplate = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        answers: Answers = "template",
    ) -> None:
        for key, value, allowed in (("chat_template", chat_template, ChatTemplate), ("answers", answers, Answers)):
            if value not in get_args(allowed):
                raise UserError(f"{key} is {value!r}; allowed are {', '.join(get_args(allowed))}")
        self.tokenizer = tokenizer
        self.name = name_of(tokenizer)
        self.notes: list[str] = []
        self.uses_template = chat_template != "never" and tokenizer.chat_template is not None
        if chat_template == "always" and not self.uses_template:
            raise UserError(
                f"tokenizer {self.name}: has no chat template, but chat_template is 'always'. "
                "Use a chat model's tokenizer, or chat_template 'never' for plain text."
            )
        if tokenizer.split_special_tokens:
            self.notes.append(
                "the tokenizer's split_special_tokens is set, but special tokens in the text are encoded as single "
                "tokens here; unset it for the programs that will serve the model"
            )
        # Number of end tokens that the template puts after an answer; 0: none, so the end token is appended.
        self._template_ends = 0
        self._template: Template | None = None
        self._beginning: list[int] = []
        self._boundary_remedy = "End plain-text prompts with one line break and begin responses without any"
        self._conversation_remedy = "Set data.answers=verbatim, use" if answers == "template" else "Use"
        if self.uses_template:
            self._template = template = Template(tokenizer, template_arguments)
            self._renderer = ChatRenderer(template, answers)
            self.end_token_id, self._template_ends = template.end_token_id, template.num_ends
            self.notes += template.notes
            if template.between and answers == "template":
                self.notes.append(
                    f"the chat template puts {template.between!r} between the generation prompt and an answer: it is "
                    "learned as part of each answer; see data.template_arguments and data.answers"
                )
            self._boundary_remedy = "Begin the response without line breaks, use another chat template"
            if template.opening:
                self._boundary_remedy = (
                    f"The generation prompt ends with {template.opening!r}: set data.answers=verbatim for answers that "
                    "continue it, use another chat template"
                )
        else:
            self.end_token_id = end_of_text(tokenizer, "has no end token")
            self._beginning = beginning_tokens(tokenizer)
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in (None, tokenizer.eos_token_id) else int(unknown)

    def encode(self, row: Row) -> Sample:
        """Encode one row. Raises the error that :meth:`encode_many` returns."""
        sample = self.encode_many([row])[0]
        if isinstance(sample, UserError):
            raise sample
        return sample

    def prompt_text(self, row: Row) -> str:
        """Render the row's prompt, up to where a response begins; plain text comes without the beginning token.

        Raises:
            UserError: the prompt cannot be rendered completely.
        """
        rendered = self._render(replace(row, responses=()))
        if isinstance(rendered, UserError):
            raise rendered
        return rendered.prompt

    def encode_many(self, rows: Sequence[Row]) -> list[Sample | UserError]:
        """Encode rows in one tokenizer call, which fast tokenizers spread over threads.

        Returns:
            for each row its sample, or an error: a :class:`BoundaryError` for a row to be dropped and counted under
            the error's ``reason``; another :class:`UserError` for an invalid row, which the chat template or the value
            of ``chat_template`` does not accept.
        """
        rendered = [self._render(row) for row in rows]
        texts: list[str] = []
        for text in rendered:
            if isinstance(text, RenderedRow):
                texts.append(text.prompt)
                for answer in text.answers:
                    texts += [answer.whole] if answer.before == text.prompt else [answer.before, answer.whole]
        tokens = iter(token_ids(self.tokenizer, texts))
        return [
            text if isinstance(text, UserError) else self._sample(row, text, tokens)
            for row, text in zip(rows, rendered, strict=True)
        ]

    def _render(self, row: Row) -> RenderedRow | UserError:
        try:
            if self._template is None:
                return render_plain(row, self.name)
            return self._renderer.render(row)
        except UserError as reason:
            return reason

    # ------------------------------------------------------------------------------------------------- text to tokens

    def _sample(self, row: Row, text: RenderedRow, tokens: Iterator[list[int]]) -> Sample | BoundaryError:
        """Build the row's sample.

        Args:
            tokens: token ids of the prompt; then of each answer's ``before``, if that is not the prompt, and ``whole``.
        """
        prompt = self._begun(next(tokens), text.remarks)
        parts = []
        for answer in text.answers:
            before = prompt if answer.before == text.prompt else self._begun(next(tokens))
            parts.append((answer, before, self._begun(next(tokens))))
        try:
            if is_conversation(row):
                prompt, responses, marks = self._conversation(row, parts, text.remarks)
            else:
                responses, marks = self._responses(row, prompt, parts), None
        except BoundaryError as reason:
            return reason
        if self._unknown is not None:
            unknown = str(self.tokenizer.unk_token)
            for answer, response in zip(text.answers, responses, strict=False):
                if self._unknown in response and unknown not in answer.whole:
                    text.remarks.append(f"responses contain characters unknown to the tokenizer ({unknown})")
        return Sample(
            prompt=prompt,
            responses=tuple(responses),
            rewards=np.array(
                [np.nan if response.reward is None else response.reward for response in row.responses], dtype=np.float64
            ),
            ranked=row.ranked,
            location=row.location,
            # Shape [0, 0] for a prompt without responses.
            ensemble=np.array([one.ensemble for one in row.responses] or np.zeros((0, 0)), dtype=np.float64),
            reference_rewards=np.array(row.reference_rewards, dtype=np.float64),
            answers=marks,
            remarks=tuple(text.remarks),
        )

    def _begun(self, ids: list[int], remarks: list[str] | None = None) -> np.ndarray:
        """Prepend the beginning tokens that plain text gets, unless they are present."""
        if self._beginning and ids[: len(self._beginning)] != self._beginning:
            ids = self._beginning + ids
        elif self._beginning and remarks is not None:
            remarks.append("prompts already begin with the tokenizer's beginning token, which is not added again")
        return np.array(ids, dtype=np.int32)

    def _ended(self, response: np.ndarray, truncated: bool) -> np.ndarray:
        """The response with its end token, without the text that a template adds after it."""
        if truncated:
            return response
        ends = np.flatnonzero(response == self.end_token_id)
        if 0 < self._template_ends <= len(ends):
            return response[: ends[-self._template_ends] + 1]
        if len(ends) and ends[-1] == len(response) - 1:
            return response
        return np.append(response, np.int32(self.end_token_id))

    def _responses(
        self, row: Row, prompt: np.ndarray, parts: Sequence[tuple[Answer, np.ndarray, np.ndarray]]
    ) -> list[np.ndarray]:
        responses = []
        for (answer, _, whole), given in zip(parts, row.responses, strict=True):
            if len(prompt) == 0 or not np.array_equal(whole[: len(prompt)], prompt):
                raise BoundaryError(
                    f"{row.location}: {answer.name} has no boundary in tokens: the prompt's tokens are not the "
                    f"first tokens of prompt and response together. {self._boundary_remedy}, or drop the row."
                )
            response = self._ended(whole[len(prompt) :], answer.truncated)
            if len(response) < (1 if answer.truncated else 2):
                raise BoundaryError(f"{row.location}: {answer.name} has {NO_TOKEN}. Drop the row.")
            if given.weight == 0:
                raise NothingToLearnError(f"{row.location}: {answer.name} has weight 0. Drop the row.")
            responses.append(response)
        return responses

    def _conversation(
        self, row: Row, parts: Sequence[tuple[Answer, np.ndarray, np.ndarray]], remarks: list[str]
    ) -> tuple[np.ndarray, list[np.ndarray], tuple[np.ndarray]]:
        """(prompt, one row of tokens, mask of the answers in it, each from its generation prompt to its end token).

        An answer that the template renders differently once others follow, as Qwen3's does, is context: its tokens in
        the conversation are not those that a policy would generate.
        """
        last, before, whole = parts[-1]
        whole = np.concatenate([whole[: len(before)], self._ended(whole[len(before) :], last.truncated)])
        is_answer = np.zeros(len(whole), dtype=bool)
        first, changed = len(whole), None
        for answer, before, after in parts:
            tokens = after[len(before) :]
            if self._template_ends or answer is last:
                tokens = self._ended(tokens, answer.truncated)
            end = len(before) + len(tokens)
            fits = np.array_equal(whole[: len(before)], before) and np.array_equal(after[: len(before)], before)
            if answer is last and answer.learned and not fits:
                raise BoundaryError(
                    f"{row.location}: {answer.name} has no boundary in tokens: the tokens before it are not the first "
                    f"tokens of the whole conversation. {self._boundary_remedy}, or drop the row."
                )
            if not fits or not np.array_equal(whole[len(before) : end], tokens):
                changed = changed or answer
            elif answer.learned:
                is_answer[len(before) : end] = True
                first = min(first, len(before))
        if changed is not None and not is_answer.any():
            raise BoundaryError(
                f"{row.location}: {changed.name} has no boundary in tokens: the chat template renders earlier messages "
                f"differently once others follow. {self._conversation_remedy} another template, or drop the row."
            )
        if changed is not None:
            remarks.append(
                "conversations have answers that the chat template renders differently once others follow: they are "
                "context and not learned"
            )
        return whole[:first], [whole[first:]], (is_answer[first:],)
