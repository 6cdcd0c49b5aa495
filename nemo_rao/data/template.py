"""A tokenizer's chat template: renders messages and determines the text that it puts around every answer.

That text is found by rendering a probe. For ChatML's ``...<|im_end|>\\n<|im_start|>assistant\\nPROBE<|im_end|>\\n``:

    generation prompt   <|im_start|>assistant\\n    rendered on request, or the header that the template puts there
    behind              <|im_end|>\\n               follows an answer; its end token ends every response
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
        end_token_id: token that ends an answer: the template's end of turn, else the tokenizer's end token.
        end_text: its text.
        num_ends: number of end tokens that the template puts after an answer; 0: none, so it must be appended.
        before: whitespace that the template puts between the generation prompt and an answer.
        behind: text that the template puts after an answer.
        header: text appended to rendered prompts if the template has no generation prompt; usually empty.
        opening: end of the generation prompt that opens a block (``<think>\\n``), or empty.
        closing: text that closes this block (``</think>``).
        markers: special tokens that the template itself writes, in order.
        notes: peculiarities of the template, one line each.

    Raises:
        UserError: the template cannot render a question and an answer, or ends an answer with text that is not a
            special token.
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

        location = f"tokenizer {self.name}"
        question: list[Message] = [{"role": "user", "content": QUESTION}]
        asked = self.prompt(question, location)
        whole = self.render([*question, {"role": "assistant", "content": PROBE}], location)
        lead, found, self.behind = whole.rpartition(PROBE)
        for who, there in (("assistant", found), ("user", QUESTION in asked)):
            if not there:
                raise UserError(f"{location}: its chat template leaves out the {who}'s message. Use another template.")
        between = lead[len(asked) :] if lead.startswith(asked) else ""
        self.before = between if between.isspace() else ""
        if between.strip() and self._renders_as(question, location, asked):
            between = self._take_header(between)
        self.opening, self.closing = _opened_block(asked + self.header, lead)
        self.between = between if between.strip() else ""
        self.end_token_id, self.num_ends = self._end_of_turn(location)
        self.end_text = str(tokenizer.convert_ids_to_tokens(self.end_token_id))
        own = whole.replace(PROBE, "").replace(QUESTION, "") + asked
        special = [text for text in map(str, tokenizer.all_special_tokens) if not _THINKING.search(text)]
        special += [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.markers = tuple(sorted({text for text in special if text.strip() and text in own}, key=own.index))

    def prompt(self, messages: Sequence[Message], location: str, fields: Mapping[str, Any] | None = None) -> str:
        """Render messages, followed by the generation prompt."""
        return self._apply(messages, True, location, fields) + self.header

    def render(self, messages: Sequence[Message], location: str, fields: Mapping[str, Any] | None = None) -> str:
        """Render messages, the last of which is an answer.

        Args:
            location: source of the messages, for error messages.
            fields: further arguments of the template (``tools``, ``documents``).

        Raises:
            UserError: the template rejects them.
        """
        return self._apply(messages, False, location, fields)

    def left_out(self, messages: Sequence[Message]) -> int | None:
        """Index of the first message that the template always leaves out, because of its role or position."""
        shape = tuple((str(message["role"]), bool(message.get("content")), *sorted(message)) for message in messages)
        if shape not in self._left_out:
            probes = [f"Probe {number}, boundary." for number in range(len(shape))]
            probing = [
                {**message, "content": probe} if message.get("content") else message
                for message, probe in zip(messages, probes, strict=True)
            ]
            try:
                text = self._apply(probing, True, "", None)
            except UserError:  # the template has requirements on the content, so probing reveals nothing
                text = "".join(probes)
            lost = (at for at, message in enumerate(probing) if message.get("content") and probes[at] not in text)
            self._left_out[shape] = next(lost, None)
        return self._left_out[shape]

    @functools.cached_property
    def no_content(self) -> str | None:
        """Value for the missing content of a message with ``tool_calls``: some templates require null."""
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
        """A message for the template, without ``weight`` and empty fields, of which Parquet files have many."""
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
        self, messages: Sequence[Message], generation_prompt: bool, location: str, fields: Mapping[str, Any] | None
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
        except Exception as error:  # template code may raise anything for a row that it was not written for
            roles = ", ".join(str(message["role"]) for message in messages)
            beside = f" with {', '.join(fields)}" if fields else ""
            raise UserError(
                f"{location}: the chat template of tokenizer {self.name} rejects messages of {roles}{beside} "
                f"({' '.join(str(error).split()) or type(error).__name__}). Change the row or use another template."
            ) from None

    def _renders_as(self, question: list[Message], location: str, asked: str) -> bool:
        """Whether the question renders the same without a generation prompt."""
        try:
            return self.render(question, location) == asked
        except UserError:
            return False

    def _take_header(self, between: str) -> str:
        """Use the text that precedes an answer as the generation prompt. Returns the rest of it before the answer."""
        # An empty thinking block belongs to the answer. A trailing space merges with the answer's first word.
        self.header = _EMPTY_BLOCK.sub("", between).rstrip(" ")
        self.notes.append(
            f"the chat template has no generation prompt: prompts end with {self.header!r} instead, which it puts "
            "before an answer"
        )
        left = between[len(self.header) :]
        if left.isspace():
            self.before = left
        return left

    def _end_of_turn(self, location: str) -> tuple[int, int]:
        """Token that ends an answer, and how often the template puts it after one (0: eos is appended)."""
        added = added_tokens(self.tokenizer)
        (tokens,) = token_ids(self.tokenizer, [self.behind])
        ends = [at for at, token in enumerate(tokens) if token in added]
        inside = self.behind if not ends else str(self.tokenizer.decode(tokens[: ends[0]]))
        if not ends and inside.strip():
            raise UserError(
                f"{location}: its chat template ends an answer with {inside!r}, which contains no special token of the "
                "tokenizer and would be learned letter by letter. Add the token to the tokenizer (and to the model's "
                "vocabulary), or use another template or data.chat_template=never."
            )
        if inside.strip():
            self.notes.append(f"the chat template puts {inside!r} between an answer and its end token; it is learned")
        if ends:
            return tokens[ends[0]], tokens.count(tokens[ends[0]])
        complaint = "has no end token, and its chat template does not end an answer with one"
        return end_of_text(self.tokenizer, complaint), 0


def depends_on_the_day(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> bool:
    """Whether the chat template writes the current date, with no argument to fix it, so that tokens change daily."""
    return chat_template != "never" and _asks_for_the_day(tokenizer) and not _takes_a_day(tokenizer)


def _asks_for_the_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def _takes_a_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "date_string" in str(tokenizer.chat_template)


def _opened_block(asked: str, lead: str) -> tuple[str, str]:
    """(opening, closing) of a block that the generation prompt opens.

    Args:
        asked: a prompt with its generation prompt.
        lead: the prompt with the text before an answer. If that opens the same block, the block belongs to the answer
            (``<assistant>``), unless its name contains "think" or "reason".
    """
    found = _OPEN_TAG.search(asked)
    if found is None:
        return "", ""
    name = found["angle"] or found["square"]
    if lead.rstrip().endswith(found[0].rstrip()) and not _THINKING.search(name):
        return "", ""
    return found[0], f"</{name}>" if found["angle"] else f"[/{name}]"
