"""Rows to tokens, with exact boundaries between prompt and response.

A row is rendered twice: the prompt alone, up to where the model would begin to answer (its generation prompt), and
the prompt with the answer. The first's tokens must be a prefix of the second's; what follows is the response. Where
the tokenizer has merged characters across the boundary no such split exists, and the row is refused: its log-probs
would be those of another text than the one the model continues.

The response ends with the end token, the one the template puts behind an answer (its end of turn) or else the
tokenizer's; whatever a template adds behind it ("\\n" in ChatML) is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from nemo_rao.batch import Row, Sample
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "always", "never"]
Answers = Literal["template", "verbatim"]
PROBE = "Tell me, boundary."


class BoundaryError(UserError):
    """A row whose prompt and response cannot be told apart in tokens. Loading drops and counts such rows.

    Attributes:
        reason: what rows dropped for the same cause are counted under.
    """

    reason = "no boundary in tokens between prompt and response"


class ContentError(BoundaryError):
    """A row of which the chat template leaves out text or a field. Dropped and counted, like the others."""

    reason = "text or fields that the chat template leaves out"


def inner_ends(sample: Sample, end_token_id: int) -> int:
    """How many of the sample's responses hold the end token inside an answer, before its end."""
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


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer from a local folder or by name. Code that it brings along is never run.

    Raises:
        UserError: it cannot be loaded, or neither it nor its chat template has an end token.
    """
    name = os.path.expanduser(os.fspath(path))
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(f"tokenizer {name}: no such folder; give a folder with a Hugging Face tokenizer, or a name")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # many kinds: network, access, damaged files, a class that is not known
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"tokenizer {name}: cannot be loaded ({type(error).__name__}: {reason}); give a folder with a Hugging Face "
            "tokenizer (tokenizer.json, tokenizer_config.json) or the name of one"
        ) from None
    if tokenizer.eos_token_id is None:
        Encoder(tokenizer)  # raises unless the chat template has an end of turn
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills rows after their end: the tokenizer's pad token, else its end token, else 0 (it is never seen)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def depends_on_the_day(tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate) -> bool:
    """Whether the same text has other tokens tomorrow, since the chat template shows a date that cannot be given."""
    return chat_template != "never" and _asks_for_the_day(tokenizer) and not _takes_a_day(tokenizer)


def _asks_for_the_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def _takes_a_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "date_string" in str(tokenizer.chat_template)


def _is_chat(row: Row) -> bool:
    return any(response.continuation for response in row.responses)


class Encoder:
    """Turns rows into samples with one tokenizer.

    Args:
        tokenizer: of Hugging Face.
        chat_template: ``auto``: through the tokenizer's chat template where it has one, a prompt of plain text being
            one user message. ``always``: the same, but refused where it has none. ``never``: text as it stands, after
            the beginning token where the tokenizer adds one.
        template_arguments: passed to the chat template (``enable_thinking`` and the like). Llama's ``date_string``
            is pinned to the template's own default unless given: the day's date in every prompt would make each day's
            tokens new, and reference sums useless the day after.
        answers: ``template``: answers are rendered by the chat template. ``verbatim``: an answer's text follows the
            generation prompt unchanged, and the template's end of turn follows the answer.

    Attributes:
        notes: what is unusual about the tokenizer or its template, one line each, to be reported once.
        end_token_id: the token that ends every response.
        uses_template: prompts go through the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: ChatTemplate = "auto",
        template_arguments: Mapping[str, Any] | None = None,
        answers: Answers = "template",
    ) -> None:
        if chat_template not in get_args(ChatTemplate):
            allowed = ", ".join(get_args(ChatTemplate))
            raise UserError(f"chat_template is {chat_template!r}; allowed are {allowed}")
        if answers not in get_args(Answers):
            raise UserError(f"answers is {answers!r}; allowed are {', '.join(get_args(Answers))}")
        self.notes: list[str] = []
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        self.uses_template = chat_template != "never" and tokenizer.chat_template is not None
        if chat_template == "always" and not self.uses_template:
            raise UserError(
                f"tokenizer {self.name}: has no chat template, but chat_template is 'always'; "
                "use a chat model's tokenizer, or chat_template 'never' for plain text"
            )
        self._arguments = dict(template_arguments or {})
        if self.uses_template and _asks_for_the_day(tokenizer) and _takes_a_day(tokenizer):
            self._arguments.setdefault("date_string", "26 Jul 2024")
        # How many end tokens the template itself puts behind an answer; 0: none, the end token is appended.
        self._template_ends = 0
        self._boundary_remedy = "end plain-text prompts with one line break and begin responses without any"
        if self.uses_template:
            self._boundary_remedy = "begin the response without line breaks or use another chat template"
            self.end_token_id, self._template_ends = self._end_of_turn()
        else:
            self.end_token_id = self._eos("has no end token")
            self._beginning = self._beginning_tokens()

    def encode(self, row: Row) -> Sample:
        """The row's sample. See :meth:`encode_many`."""
        sample = self.encode_many([row])[0]
        if isinstance(sample, UserError):
            raise sample
        return sample

    def encode_many(self, rows: Sequence[Row]) -> list[Sample | BoundaryError]:
        """The rows' samples, tokenised in one call, which fast tokenizers spread over threads.

        Returns:
            for each row its sample, or the reason why it has none.

        Raises:
            UserError: the chat template or this choice of ``chat_template`` does not take the row's messages.
        """
        chats = {at: self._encode_chat(row) for at, row in enumerate(rows) if _is_chat(row)}
        texts: list[str] = []
        for at, row in enumerate(rows):
            if at not in chats:
                texts.extend(self._render(row))
        tokens = iter(self._tokenise(texts))
        return [
            chats[at] if at in chats else self._split(row, [next(tokens) for _ in range(1 + len(row.responses))])
            for at, row in enumerate(rows)
        ]

    # -------------------------------------------------------------------------------------------------- one row

    def _render(self, row: Row) -> list[str]:
        """The prompt's text, then each response's text with the prompt before it."""
        if not self.uses_template:
            if not isinstance(row.prompt, str):
                raise UserError(
                    f"{row.place}: the prompt is a list of messages, which needs a chat template; tokenizer "
                    f"{self.name} has none or chat_template is 'never'"
                )
            return [row.prompt] + [row.prompt + response.content for response in row.responses]
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        answers = [[*messages, {"role": "assistant", "content": response.content}] for response in row.responses]
        return [self._apply_template(messages, True, row.place)] + [
            self._apply_template(answer, False, row.place) for answer in answers
        ]

    def _encode_chat(self, row: Row) -> Sample | BoundaryError:
        """A conversation: one row of tokens, with every answer marked from its generation prompt to its end token."""
        if not self.uses_template:
            self._render(row)  # raises
        prompt = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        (response,) = row.responses
        messages = [*prompt, {"role": "assistant", "content": response.content}, *response.continuation]
        turns = [at for at in range(len(prompt), len(messages)) if messages[at]["role"] == "assistant"]
        texts = [self._apply_template(messages, False, row.place)]
        for at in turns:
            texts.append(self._apply_template(messages[:at], True, row.place))
            texts.append(self._apply_template(messages[: at + 1], False, row.place))
        whole, *around = self._tokenise(texts)
        is_answer = np.zeros(len(whole), dtype=bool)
        for number, (before, after) in enumerate(zip(around[::2], around[1::2], strict=True), start=1):
            is_last, answer = number == len(turns), after[len(before) :]
            if self._template_ends or is_last:
                answer = self._up_to_end(answer)
            end = len(before) + len(answer)
            fits = np.array_equal(whole[: len(before)], before) and np.array_equal(after[: len(before)], before)
            if is_last and not self._template_ends:  # it is given the end token that the template does not
                whole, is_answer = np.append(whole, answer[-1:]), np.append(is_answer, False)
            if not fits or not np.array_equal(whole[len(before) : end], answer):
                return BoundaryError(
                    f"{row.place}: answer {number} of the conversation has no boundary in tokens: the chat template "
                    "renders earlier messages otherwise once others follow; use another template, or drop the row"
                )
            is_answer[len(before) : end] = True
        first = len(around[0])
        return Sample(
            prompt=whole[:first],
            responses=(whole[first:end],),
            rewards=np.full(1, np.nan),
            ranked=False,
            place=row.place,
            ensemble=np.zeros((1, 0)),
            reference_rewards=np.zeros(0),
            answers=(is_answer[first:end],),
        )

    def _up_to_end(self, response: np.ndarray) -> np.ndarray:
        """The response with its end token, and without what a template adds behind it."""
        ends = np.flatnonzero(response == self.end_token_id)
        if 0 < self._template_ends <= len(ends):
            return response[: ends[-self._template_ends] + 1]
        return np.append(response, np.int32(self.end_token_id))

    def _apply_template(self, messages: list[Any], add_generation_prompt: bool, place: str) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._arguments
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(
                f"{place}: the chat template of tokenizer {self.name} refuses messages of {roles} "
                f"({' '.join(str(error).split())}); change the row or use another template"
            ) from None

    def _tokenise(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids (int32) of each text, the beginning token first where plain text gets one."""
        if not texts:
            return []
        # Special tokens come from the template; a prompt's and an answer's tokens must not each be closed by one.
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        beginning = [] if self.uses_template else self._beginning
        return [np.array(beginning + list(ids), dtype=np.int32) for ids in batch]

    def _split(self, row: Row, tokens: list[np.ndarray]) -> Sample | BoundaryError:
        prompt, *wholes = tokens
        responses = []
        for number, whole in enumerate(wholes):
            if len(prompt) == 0 or not np.array_equal(whole[: len(prompt)], prompt):
                return BoundaryError(
                    f"{row.place}: response {number + 1} has no boundary in tokens: the prompt's tokens are not the "
                    f"first tokens of prompt and response together; {self._boundary_remedy}, or drop the row"
                )
            response = self._up_to_end(whole[len(prompt) :])
            if len(response) < 2:
                return BoundaryError(
                    f"{row.place}: response {number + 1} has no token of its own before the end token; drop the row"
                )
            responses.append(response)
        return Sample(
            prompt=prompt,
            responses=tuple(responses),
            rewards=np.array(
                [np.nan if response.reward is None else response.reward for response in row.responses], dtype=np.float64
            ),
            ranked=row.ranked,
            place=row.place,
            ensemble=np.array([response.ensemble for response in row.responses], dtype=np.float64),
            reference_rewards=np.array(row.reference_rewards, dtype=np.float64),
        )

    # ---------------------------------------------------------------------------------- what the tokenizer does

    def _end_of_turn(self) -> tuple[int, int]:
        """The token by which the template ends an answer, and how often it stands behind one (0: eos is appended)."""
        place = f"tokenizer {self.name}"
        conversation = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": PROBE}]
        text = self._apply_template(conversation, False, place)
        _, found, behind = text.rpartition(PROBE)
        if not found:
            raise UserError(f"{place}: its chat template leaves out the assistant's message; use another template")
        # Some vocabularies have runs of blanks as added tokens: these end nothing.
        added = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        added.update(self.tokenizer.all_special_ids)
        tokens = [int(token) for token in self._tokenise([behind])[0]] if behind else []
        for token in tokens:
            if token in added:
                return token, tokens.count(token)
        return self._eos("has no end token, nor does its chat template end an answer with one"), 0

    def _eos(self, complaint: str) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {self.name}: {complaint}; set its eos_token")
        return int(self.tokenizer.eos_token_id)

    def _beginning_tokens(self) -> list[int]:
        """The special tokens that the tokenizer puts before plain text."""
        bare = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        full = self.tokenizer(PROBE, add_special_tokens=True)["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []
