"""A tokenizer's chat template: renders messages, and knows what the template puts around every answer.

That is found by rendering a probe. Of ChatML's ``...<|im_end|>\\n<|im_start|>assistant\\nPROBE<|im_end|>\\n``:

    generation prompt   <|im_start|>assistant\\n    rendered on request, or the header that the template puts there
    behind              <|im_end|>\\n               what follows an answer; its end token ends every response
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_rao.data.tokens import added_tokens, end_of_text, name_of, token_ids
from nemo_rao.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

QUESTION = "Hello."
PROBE = "Tell me, boundary."
_OPEN_TAG = re.compile(r"(?:<(?P<angle>\w+)>|\[(?P<square>\w+)\])\s*\Z")
_EMPTY_BLOCK = re.compile(r"(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*\Z")
_THINKING = re.compile(r"think|reason", re.IGNORECASE)


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: has a chat template.
        arguments: passed to the template.

    Attributes:
        end_token_id: the token that ends an answer: the template's end of turn, else the tokenizer's end token.
        end_text: its text.
        num_ends: how many end tokens the template puts behind an answer; 0: none, the end token is to be appended.
        before: blanks that the template puts between the generation prompt and an answer.
        behind: what the template puts behind an answer.
        header: what is added to rendered prompts, since the template has no generation prompt; often empty.
        opening: the end of the generation prompt that opens a block (``<think>\\n``), or empty.
        closing: what closes this block (``</think>``).
        markers: special tokens that the template itself writes, in their order.
        notes: what is unusual about the template, one line each.

    Raises:
        UserError: the template cannot render a question and an answer, or ends an answer with text that is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.name = name_of(tokenizer)
        self._arguments = dict(arguments or {})
        if _asks_for_the_day(tokenizer) and _takes_a_day(tokenizer):
            self._arguments.setdefault("date_string", "26 Jul 2024")
        self.notes: list[str] = []
        self.header = ""
        self._left_out: dict[tuple[Any, ...], int | None] = {}

        place = f"tokenizer {self.name}"
        question: list[Message] = [{"role": "user", "content": QUESTION}]
        asked = self.prompt(question, place)
        whole = self.render([*question, {"role": "assistant", "content": PROBE}], place)
        lead, found, self.behind = whole.rpartition(PROBE)
        for who, there in (("assistant", found), ("user", QUESTION in asked)):
            if not there:
                raise UserError(f"{place}: its chat template leaves out the {who}'s message; use another template")
        between = lead[len(asked) :] if lead.startswith(asked) else ""
        self.before = between if between.isspace() else ""
        if between.strip() and self._renders_as(question, place, asked):
            between = self._take_header(between)
        self.opening, self.closing = _opened_block(asked + self.header, lead)
        self.between = between if between.strip() else ""
        self.end_token_id, self.num_ends = self._end_of_turn(place)
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_token_id))
        own = whole.replace(PROBE, "").replace(QUESTION, "") + asked
        special = [text for text in map(str, tokenizer.all_special_tokens) if not _THINKING.search(text)]
        special += [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.markers = tuple(sorted({text for text in special if text.strip() and text in own}, key=own.index))

    def prompt(self, messages: Sequence[Message], place: str, fields: Mapping[str, Any] | None = None) -> str:
        """The messages up to where the model begins to answer."""
        return self._apply(messages, True, place, fields) + self.header

    def render(self, messages: Sequence[Message], place: str, fields: Mapping[str, Any] | None = None) -> str:
        """The messages, of which the last one is an answer.

        Args:
            place: where they came from, for messages.
            fields: what the template takes beside the messages (``tools``, ``documents``).

        Raises:
            UserError: the template refuses them.
        """
        return self._apply(messages, False, place, fields)

    def left_out(self, messages: Sequence[Message]) -> int | None:
        """The first message that the template leaves out whatever its content, because of its role or position."""
        shape = tuple((str(message["role"]), bool(message.get("content")), *sorted(message)) for message in messages)
        if shape not in self._left_out:
            probes = [f"Probe {number}, boundary." for number in range(len(shape))]
            probing = [
                {**message, "content": probe} if message.get("content") else message
                for message, probe in zip(messages, probes, strict=True)
            ]
            try:
                text = self._apply(probing, True, "", None)
            except UserError:  # it insists on something about the content: nothing is known
                text = "".join(probes)
            lost = (at for at, message in enumerate(probing) if message.get("content") and probes[at] not in text)
            self._left_out[shape] = next(lost, None)
        return self._left_out[shape]

    @functools.cached_property
    def no_content(self) -> str | None:
        """What the template takes for the missing content of a message with ``tool_calls``: some insist on null."""
        calls = [{"type": "function", "id": "probe0000", "function": {"name": "probe_call", "arguments": {}}}]
        question = {"role": "user", "content": QUESTION}
        for content in ("", None):
            try:
                if "probe_call" in self.render(
                    [question, {"role": "assistant", "content": content, "tool_calls": calls}], ""
                ):
                    return content
            except UserError:
                continue
        return ""

    def message(self, given: Message) -> dict[str, Any]:
        """A message as the template gets it, without empty fields, in which Parquet files are rich, and ``weight``."""
        message = {
            name: value
            for name, value in given.items()
            if name in ("role", "content") or (name != "weight" and value is not None and value != [])
        }
        if not message.get("content"):
            message["content"] = self.no_content if message.get("tool_calls") else ""
        return message

    # ------------------------------------------------------------------------------------------------------- probes

    def _apply(
        self, messages: Sequence[Message], generation_prompt: bool, place: str, fields: Mapping[str, Any] | None
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),  # type: ignore[arg-type]
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **{**self._arguments, **(fields or {})},
                )
            )
        except Exception as error:  # a template's code may raise anything over a row that it was not written for
            roles = ", ".join(str(message["role"]) for message in messages)
            beside = f" with {', '.join(fields)}" if fields else ""
            raise UserError(
                f"{place}: the chat template of tokenizer {self.name} refuses messages of {roles}{beside} "
                f"({' '.join(str(error).split()) or type(error).__name__}); change the row or use another template"
            ) from None

    def _renders_as(self, question: list[Message], place: str, asked: str) -> bool:
        """The template renders the question in the same way where no generation prompt is asked for."""
        try:
            return self.render(question, place) == asked
        except UserError:
            return False

    def _take_header(self, between: str) -> str:
        """Make what precedes an answer the generation prompt; returns what is left of it before the answer."""
        # An empty block of thinking belongs to the answer. A blank at the end merges with the answer's first word.
        self.header = _EMPTY_BLOCK.sub("", between).rstrip(" ")
        self.notes.append(
            f"the chat template has no generation prompt: {self.header!r}, which it puts before an answer, ends every "
            "prompt instead"
        )
        left = between[len(self.header) :]
        if left.isspace():
            self.before = left
        return left

    def _end_of_turn(self, place: str) -> tuple[int, int]:
        """The token by which the template ends an answer, and how often it stands behind one (0: eos is appended)."""
        added = added_tokens(self.tokenizer)
        (tokens,) = token_ids(self.tokenizer, [self.behind])
        ends = [at for at, token in enumerate(tokens) if token in added]
        inside = self.behind if not ends else str(self.tokenizer.decode(tokens[: ends[0]]))
        if not ends and inside.strip():
            raise UserError(
                f"{place}: its chat template ends an answer with {inside!r}, which holds no special token of the "
                "tokenizer and would be learned letter by letter; add the token to the tokenizer (and to the model's "
                "vocabulary), or use another template or data.chat_template=never"
            )
        if inside.strip():
            self.notes.append(f"the chat template puts {inside!r} between an answer and its end token; it is learned")
        if ends:
            return tokens[ends[0]], tokens.count(tokens[ends[0]])
        complaint = "has no end token, nor does its chat template end an answer with one"
        return end_of_text(self.tokenizer, complaint), 0


def depends_on_the_day(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> bool:
    """Whether the same text has other tokens tomorrow, since the chat template shows a date that cannot be given."""
    return chat_template != "never" and _asks_for_the_day(tokenizer) and not _takes_a_day(tokenizer)


def _asks_for_the_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def _takes_a_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "date_string" in str(tokenizer.chat_template)


def _opened_block(asked: str, lead: str) -> tuple[str, str]:
    """(opening, closing) of a block that the generation prompt opens.

    Args:
        asked: a prompt with its generation prompt.
        lead: the prompt with what stands before an answer. Where that opens the same block, it is the answer's own
            (``<assistant>``), unless it is called thinking.
    """
    found = _OPEN_TAG.search(asked)
    if found is None:
        return "", ""
    name = found["angle"] or found["square"]
    if lead.rstrip().endswith(found[0].rstrip()) and not _THINKING.search(name):
        return "", ""
    return found[0], f"</{name}>" if found["angle"] else f"[/{name}]"
