"""Prompts from files in every training format, with responses left out, and from rows without responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows import reading as rows
from nemo_rao.rows.fields import Messages
from nemo_rao.rows.formats import FORMATS, recognize
from nemo_rao.rows.prompt import CONVERSATIONS, asks_alone, read_asked
from nemo_rao.rows.responses import make_row
from nemo_rao.rows.view import Columns, View

_MARKS = {mark for known in FORMATS for mark in known.marks} - set(CONVERSATIONS)


@dataclass(frozen=True)
class Prompt:
    """A prompt for sampling.

    Attributes:
        content: messages or plain text, as in :class:`nemo_rao.batch.Row`.
        location: where it came from.
        fields: other fields of its row, such as a reference answer.
        template_fields, plain: ``template_fields`` and ``plain_prompt`` of :class:`nemo_rao.batch.Row`.
        unused: paths of the fields that nothing reads and that are not ``carried``.
        has_responses: whether its row had responses, which are left out.
    """

    content: str | Messages
    location: str
    fields: Mapping[str, Any]
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    plain: str | None = None
    unused: tuple[str, ...] = ()
    has_responses: bool = False

    @property
    def carried(self) -> Mapping[str, Any]:
        """Fields that are written along with samples: ``fields`` of a row without responses, else none."""
        return {} if self.has_responses else self.fields

    def as_row(self) -> Row:
        """Convert to a row without responses, for the encoder."""
        return Row(
            self.content,
            (),
            self.location,
            template_fields=self.template_fields,
            plain_prompt=self.plain,
            fields=self.fields,
        )


def read_prompts(
    paths: rows.Paths,
    system: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
) -> list[Prompt]:
    """Read and check the prompts of one or several files, in order.

    Args:
        paths: see :func:`nemo_rao.rows.reading.read_rows`. Rows may also consist of a prompt only (``prompt``,
            ``question``, ...), text or messages, with its system message and tools.
        system: a system message, put before prompts that do not begin with one.
        columns, ignore_fields: see :func:`nemo_rao.rows.reading.read_rows`.

    Raises:
        UserError: a file cannot be read, a row has no prompt, or there are no rows.
    """
    names = Columns(dict(columns or {}), tuple(ignore_fields))
    prompts = [
        _with_system(prompt, system)
        for source in rows.expand_paths(paths)
        for prompt in _prompts_of_source(source, names)
    ]
    if not prompts:
        raise UserError(f"{paths}: has no rows. Pass a file with at least one prompt.")
    return prompts


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    content = with_system(prompt.content, system)
    return prompt if content is prompt.content else replace(prompt, content=content, plain=None)


def read_records(path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(location, record) pairs of a benchmark's file: one JSON array, or any kind of file that training reads."""
    if path.endswith(".json"):
        rows.expand_paths(path)
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
            whole = json.loads(text) if text.lstrip().startswith("[") else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a JSON array ({error}). Copy or download it again.") from None
        if whole is not None:
            return _objects([(f"{path} item {number}", record) for number, record in enumerate(whole, start=1)], path)
    return _objects([found for source in rows.expand_paths(path) for found in rows.read_records_of(source)], path)


def with_system(content: str | Messages, system: str | None) -> str | Messages:
    """Put a system message before the prompt, unless none is given or the prompt has one."""
    if system is None or (not isinstance(content, str) and content[0]["role"] == "system"):
        return content
    messages = ({"role": "user", "content": content},) if isinstance(content, str) else content
    return ({"role": "system", "content": system}, *messages)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Digest of a list of prompts, independent of file names."""
    found = hashlib.sha256()
    for prompt in prompts:
        asked: list[Any] = [prompt.content, prompt.carried]
        if prompt.template_fields or prompt.plain is not None:
            asked += [prompt.template_fields, prompt.plain]
        found.update(json.dumps(asked, sort_keys=True, default=str).encode())
    return found.hexdigest()[:32]


def _prompts_of_source(source: str, names: Columns) -> Iterator[Prompt]:
    """Prompts of one source. Consecutive one-response records with the same prompt count once, as in training."""
    before: Row | None = None
    for location, record in rows.read_records_of(source):
        view = names.view(record, location)
        alone = _has_prompt_alone(view)
        known = None if alone else recognize(view)
        row = make_row(view, read_asked(view), (), ()) if known is None else known.convert(view, None)
        one_of_several = known is not None and known.one_response_a_record
        if not (one_of_several and before is not None and rows.same_prompt(before, row)):
            unused = tuple(path for path in row.unused if not (alone and path in row.fields))
            yield Prompt(row.prompt, location, row.fields, row.template_fields, row.plain_prompt, unused, not alone)
        before = row if one_of_several else None


def _has_prompt_alone(view: View) -> bool:
    """Whether the record is a prompt without responses."""
    return not any(mark in view for mark in _MARKS) and asks_alone(view)


def _objects(records: list[tuple[str, Any]], path: str) -> list[tuple[str, Mapping[str, Any]]]:
    for location, record in records:
        if not isinstance(record, Mapping):
            raise UserError(f"{location}: expected an object with named fields. Write one JSON object per entry.")
    if not records:
        raise UserError(f"{path}: has no rows. Pass a file with at least one.")
    return records
