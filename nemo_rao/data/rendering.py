"""Rows to text: a prompt, and each answer with its context. No part of a row is omitted silently.

A row is rendered by the tokenizer's chat template, or is plain text. A part of a message that the template leaves out
is an error; ambiguous input gets a remark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rao.batch import Row
from nemo_rao.data.content import (
    contents_of,
    difference,
    field_names,
    find,
    find_missing_part,
    first_missing,
    quoted,
    unrendered_call,
    unrendered_fields,
)
from nemo_rao.data.dropped import BoundaryError, ContentError, NothingToLearnError, ThinkingError
from nemo_rao.data.template import Message, Template
from nemo_rao.errors import UserError

Answers = Literal["template", "verbatim"]

_NO_BLOCK = "use a template or data.template_arguments that open no block, or drop the row."
NO_TOKEN = "no token before the end token"

# Fields that change the meaning of a prompt. Others, such as a name, are only reported if they are not rendered.
_CONTENT = ("tool_calls", "tools", "documents", "functions")
# Fields that change the meaning of an answer, besides those named after reasoning or thinking.
_CONTENT_OF_ANSWERS = ("tool_calls", "function_call", "refusal")


def _is_part_of_answer(name: str) -> bool:
    """Whether a field of an answer's message belongs to the answer, rather than being metadata."""
    return name in _CONTENT_OF_ANSWERS or "reason" in name.lower() or "think" in name.lower()


@dataclass
class Answer:
    """One answer, as text.

    Attributes:
        name: for messages ("response 2").
        before: the prompt, or the conversation so far, including the generation prompt.
        whole: the same with the answer and the text that the template puts after it.
        learned: in a conversation, whether this answer is trained on.
        truncated: no end token follows it.
    """

    name: str
    before: str
    whole: str
    learned: bool = True
    truncated: bool = False


@dataclass
class RenderedRow:
    """A row as text: its prompt, its answers, and remarks (see :class:`nemo_rao.batch.Sample`)."""

    prompt: str
    answers: list[Answer] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def is_conversation(row: Row) -> bool:
    return any(response.continuation for response in row.responses)


# ------------------------------------------------------------------------------------------------------- plain text


def render_plain(row: Row, tokenizer_name: str) -> RenderedRow:
    """Render the row as plain text, without a chat template.

    Raises:
        UserError: the row consists of messages.
        ContentError: it has fields that only a template could render.
    """
    prompt = row.prompt if row.plain_prompt is None else row.plain_prompt
    if not isinstance(prompt, str) or is_conversation(row):
        raise UserError(
            f"{row.location}: the prompt is a list of messages, which needs a chat template, but tokenizer "
            f"{tokenizer_name} has none or chat_template is 'never'"
        )
    answers, remarks = [], []
    fields = [name for name, value in row.template_fields.items() if value]
    for number, response in enumerate(row.responses, start=1):
        names = field_names([response.fields])
        fields += [name for name in names if _is_part_of_answer(name)]
        remarks += [_not_rendered(name) for name in names if not _is_part_of_answer(name)]
        content = response.content if response.plain_content is None else response.plain_content
        answers.append(Answer(f"response {number}", prompt, prompt + content, truncated=response.truncated))
    if fields:
        raise ContentError(
            f"{row.location}: field '{fields[0]}' needs a chat template, but tokenizer {tokenizer_name} has none or "
            "chat_template is 'never'. List it in data.ignore_fields or drop the row."
        )
    return RenderedRow(prompt, answers, remarks)


# ----------------------------------------------------------------------------------------------------- chat template


class ChatRenderer:
    """Render rows with a chat template.

    Args:
        template: the tokenizer's chat template.
        answers: see :class:`nemo_rao.data.encode.Encoder`.
    """

    def __init__(self, template: Template, answers: Answers) -> None:
        self.template = template
        self.verbatim = answers == "verbatim"

    def render(self, row: Row) -> RenderedRow:
        """Render one row.

        Raises:
            UserError: the template rejects the row's messages.
            BoundaryError: a part of the row is not rendered, or its answers do not continue its prompt.
        """
        given = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        prompt: list[Message] = [self.template.message(message) for message in given]
        if is_conversation(row):
            return self._conversation(row, prompt)
        rendered = RenderedRow(self._prompt(prompt, row))
        rendered.remarks += self._check_fields_of_prompt(prompt, row, rendered.prompt)
        rendered.remarks += self._remarks_on_prompt(prompt)
        for number, response in enumerate(row.responses, start=1):
            message = {**response.fields, "role": "assistant", "content": response.content}
            answer = Answer(f"response {number}", rendered.prompt, "", truncated=response.truncated)
            self._complete(answer, prompt, message, row, rendered.remarks)
            rendered.answers.append(answer)
        return rendered

    def _conversation(self, row: Row, prompt: list[Message]) -> RenderedRow:
        """Render every answer that is trained on, and always the last one, each with the conversation before it."""
        (response,) = row.responses
        first = {**response.fields, "role": "assistant", "content": response.content, "weight": response.weight}
        given: list[Message] = [*prompt, first, *response.continuation]
        turns = [at for at in range(len(prompt), len(given)) if given[at]["role"] == "assistant"]
        messages: list[Message] = [self.template.message(message) for message in given]
        rendered = RenderedRow("")
        for number, at in enumerate(turns, start=1):
            learned, is_last = given[at].get("weight", 1) != 0, at == turns[-1]
            if not learned and not is_last:
                continue
            answer = Answer(f"answer {number} of the conversation", "", "", learned, is_last and response.truncated)
            # Checking the last answer and its prompt covers the whole conversation.
            render = self._prompt if is_last else self._unchecked_prompt
            answer.before = render(messages[:at], row)
            self._complete(answer, messages[:at], given[at], row, rendered.remarks)
            rendered.answers.append(answer)
        if not any(answer.learned for answer in rendered.answers):
            raise NothingToLearnError(f"{row.location}: every answer has weight 0. Drop the row.")
        before = messages[: turns[-1]]
        rendered.remarks += self._check_fields_of_prompt(before, row, rendered.answers[-1].before)
        rendered.remarks += self._remarks_on_prompt([message for message in before if message["role"] != "assistant"])
        rendered.prompt = next(answer.before for answer in rendered.answers if answer.learned)
        return rendered

    # ---------------------------------------------------------------------------------------------------- the prompt

    def _unchecked_prompt(self, messages: Sequence[Message], row: Row) -> str:
        return self.template.prompt(messages, row.location, row.template_fields)

    def _prompt(self, messages: Sequence[Message], row: Row) -> str:
        """Render the messages with the generation prompt. Raises if the content of any of them is missing."""
        text = self._unchecked_prompt(messages, row)
        contents = [contents_of(message) for message in messages]
        if (lost := self.template.left_out(messages)) is not None:
            what = quoted(contents[lost])
        elif (lost := first_missing(contents, text)) is not None:
            what = difference(contents[lost], text)
        else:
            return text
        role = messages[lost]["role"]
        raise ContentError(
            f"{row.location}: the chat template leaves out a part of message {lost + 1} ({role}): {what}. Use another "
            "template, or drop the row."
        )

    def _check_fields_of_prompt(self, messages: Sequence[Message], row: Row, text: str) -> list[str]:
        """Remarks on fields that the template does not render. Raises if the prompt loses content without them."""
        fields = {name: value for name, value in row.template_fields.items() if value}
        if not fields and not field_names(messages):
            return []

        def render(messages: Sequence[Message], fields: Mapping[str, Any]) -> str:
            return self.template.prompt(messages, row.location, fields)

        lost = unrendered_fields(messages, fields, text, render)
        for name in lost:
            if name in _CONTENT:
                raise ContentError(
                    f"{row.location}: the chat template does not render the prompt's field '{name}'. Use another "
                    "template, list the field in data.ignore_fields, or drop the row."
                )
        if (call := unrendered_call(messages, text, lambda changed, _: render(changed, fields))) is not None:
            raise ContentError(
                f"{row.location}: the chat template does not render all of the prompt's tool_calls: "
                f"{quoted(str(call))}. Use another template, or drop the row."
            )
        for holder in (fields, *messages):
            for name, value in holder.items():
                if name in _CONTENT and (part := find_missing_part(name, value, text)) is not None:
                    raise ContentError(
                        f"{row.location}: the chat template leaves out a part of the prompt's field '{name}': "
                        f"{difference(part, text)}. Use another template, or drop the row."
                    )
        return [f"prompts have a field '{name}' that the chat template does not render" for name in lost]

    def _remarks_on_prompt(self, messages: Sequence[Message]) -> list[str]:
        for marker in self.template.markers:
            if any(marker in contents_of(message) for message in messages):
                return [
                    f"prompts contain the chat template's special tokens ({marker}): if they are already rendered, set "
                    "data.chat_template=never"
                ]
        return []

    # --------------------------------------------------------------------------------------------------- the answers

    def _complete(
        self, answer: Answer, messages: Sequence[Message], given: Message, row: Row, remarks: list[str]
    ) -> None:
        """Set ``answer.whole``.

        Args:
            answer: the answer to ``messages``.
            given: the answer's message.
            remarks: list to which remarks on the answer are appended.
        """
        message = self.template.message(given)
        content = contents_of(message)
        if not content.strip() and not field_names([message]):
            raise BoundaryError(f"{row.location}: {answer.name} has {NO_TOKEN}. Drop the row.")
        end_text, closed = self.template.end_text, False
        bare = content.rstrip().removesuffix(end_text)
        if bare != content.rstrip() and bare.strip() and not answer.truncated:
            remarks.append(f"responses already end with the end token {end_text}, which is not repeated")
            closed = self.template.num_ends == 0  # the template adds none
            message["content"] = content.rstrip() if closed else bare
        markers = [marker for marker in self.template.markers if marker in content and marker != end_text]
        if markers:
            remarks.append(f"responses contain the chat template's special tokens ({markers[0]})")
        complete = self._verbatim if self.verbatim else self._rendered
        answer.whole = complete(answer, messages, message, row, remarks)
        if closed:
            answer.whole = answer.whole[: answer.whole.rindex(end_text) + len(end_text)]
        if answer.truncated:
            if not answer.whole.endswith(self.template.behind):
                raise BoundaryError(
                    f"{row.location}: {answer.name} is marked as truncated, but the chat template adds other text "
                    "after it. Drop the row."
                )
            answer.whole = answer.whole.removesuffix(self.template.behind)

    def _verbatim(
        self, answer: Answer, messages: Sequence[Message], message: Message, row: Row, remarks: list[str]
    ) -> str:
        template, text, fields = self.template, contents_of(message), field_names([message])
        remarks += [_not_rendered(name) for name in fields if not _is_part_of_answer(name)]
        if names := [name for name in fields if _is_part_of_answer(name)]:
            raise ContentError(
                f"{row.location}: {answer.name} has a field '{names[0]}', which only the chat template can render. Set "
                "data.answers=template, list the field in data.ignore_fields, or drop the row."
            )
        if template.opening:
            tag = template.opening.strip()
            if text.startswith(template.opening):
                text = text.removeprefix(template.opening)
            elif text.lstrip().startswith(tag):
                raise ThinkingError(
                    f"{row.location}: {answer.name} begins with {quoted(text[: text.index(tag) + len(tag) + 1])}, not "
                    f"with the {template.opening!r} that ends the generation prompt. Write the same in the row, or "
                    f"{_NO_BLOCK}"
                )
            if template.closing not in text and not answer.truncated:
                raise ThinkingError(
                    f"{row.location}: {answer.name} has no {template.closing}, which closes the {tag} at the end of "
                    f"the generation prompt. {_NO_BLOCK.capitalize()}"
                )
        return answer.before + template.before + text + template.behind

    def _rendered(
        self, answer: Answer, messages: Sequence[Message], message: Message, row: Row, remarks: list[str]
    ) -> str:
        template, fields = self.template, row.template_fields
        whole = template.render([*messages, message], row.location, fields)
        if not whole.startswith(answer.before):
            if template.opening and whole.startswith(answer.before.removesuffix(template.opening)):
                closed = template.closing in contents_of(message)
                remedy = (
                    f". Set data.answers=verbatim, {_NO_BLOCK}"
                    if closed
                    else f", and the answer has no {template.closing}. {_NO_BLOCK.capitalize()}"
                )
                raise ThinkingError(
                    f"{row.location}: the generation prompt ends with {template.opening!r}, which the chat template "
                    f"does not repeat before {answer.name}{remedy}"
                )
            raise BoundaryError(
                f"{row.location}: {answer.name} has no boundary in tokens: the chat template renders the prompt "
                "differently once an answer follows. Set data.answers=verbatim, use another chat template, or drop the "
                "row."
            )
        rendered, content = whole[len(answer.before) :], contents_of(message)
        opened = template.opening if content.lstrip().startswith(template.opening.strip()) else ""
        if find(opened + rendered, content) < 0:
            raise ContentError(
                f"{row.location}: the chat template leaves out a part of {answer.name}: "
                f"{difference(content, rendered.removesuffix(template.behind))}. Set data.answers=verbatim, use "
                "another template, or drop the row."
            )

        if names := field_names([message]):
            remarks += self._check_fields_of_answer(answer, messages, message, row, names, rendered)
        return whole

    def _check_fields_of_answer(
        self,
        answer: Answer,
        messages: Sequence[Message],
        message: Message,
        row: Row,
        names: Sequence[str],
        rendered: str,
    ) -> list[str]:
        """Raise if a field that belongs to the answer is missing from ``rendered``, the answer's rendering. Returns
        remarks on other fields."""

        def render(changed: Sequence[Message], _: Mapping[str, Any]) -> str:
            return self.template.render([*messages, *changed], row.location, row.template_fields)

        whole = answer.before + rendered
        lost = unrendered_fields([message], {}, whole, render)
        call = unrendered_call([message], whole, render)
        for name in names:
            what = None
            if not _is_part_of_answer(name):
                continue
            if name in lost:
                what = f"field '{name}'"
            elif name == "tool_calls" and call is not None:
                what = f"one of the tool_calls: {quoted(str(call))}"
            elif (part := find_missing_part(name, message[name], rendered)) is not None:
                what = f"a part of field '{name}': {difference(part, rendered)}"
            if what is not None:
                raise ContentError(
                    f"{row.location}: the chat template leaves out, from {answer.name}, {what}. Use another template, "
                    "list the field in data.ignore_fields, or drop the row."
                )
        return [_not_rendered(name) for name in lost if not _is_part_of_answer(name)]


def _not_rendered(name: str) -> str:
    return f"responses have a field '{name}' that is not rendered"
