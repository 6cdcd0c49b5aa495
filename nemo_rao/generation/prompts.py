"""Prompts from files: of every format that training reads, whose responses are left out, and of rows without any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rao.data import rows
from nemo_rao.data.fields import Messages, read_prompt
from nemo_rao.data.formats import FORMATS, recognise
from nemo_rao.errors import UserError

_MARKS = {mark for known in FORMATS for mark in known.marks}


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked.

    Attributes:
        content: messages or plain text, as in :class:`nemo_rao.batch.Row`.
        place: where it came from.
        fields: what else its row had, such as a reference answer, where the row had no responses.
    """

    content: str | Messages
    place: str
    fields: Mapping[str, Any]


def read_prompts(paths: rows.Paths, system: str | None = None) -> list[Prompt]:
    """The prompts of one or several files, in order; whatever is wrong with any row is found here.

    Args:
        paths: see :func:`nemo_rao.data.rows.read_rows`. Rows may also have ``prompt`` alone, text or messages.
        system: a system message, put before prompts that do not begin with one.

    Raises:
        UserError: a file cannot be read, a row has no prompt, or there is none at all.
    """
    prompts = [
        Prompt(with_system(prompt.content, system), prompt.place, prompt.fields)
        for source in rows.expand_paths(paths)
        for prompt in _prompts_of_source(source)
    ]
    if not prompts:
        raise UserError(f"{paths}: has no rows; give a file with at least one prompt")
    return prompts


def read_records(path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(place, record) of a benchmark's file: one JSON array, or whatever kind of file training reads."""
    if path.endswith(".json"):
        rows.expand_paths(path)
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read()
            whole = json.loads(text) if text.lstrip().startswith("[") else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a JSON array ({error}); copy or download it again") from None
        if whole is not None:
            return _objects([(f"{path} item {number}", record) for number, record in enumerate(whole, start=1)], path)
    return _objects([found for source in rows.expand_paths(path) for found in rows.read_records_of(source)], path)


def with_system(content: str | Messages, system: str | None) -> str | Messages:
    """The prompt after a system message; unchanged where none is given or it has its own."""
    if system is None or (not isinstance(content, str) and content[0]["role"] == "system"):
        return content
    messages = ({"role": "user", "content": content},) if isinstance(content, str) else content
    return ({"role": "system", "content": system}, *messages)


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Tells one list of prompts from another, wherever it lies."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.content, prompt.fields], sort_keys=True, default=str).encode())
    return found.hexdigest()[:32]


def _prompts_of_source(source: str) -> Iterator[Prompt]:
    """Consecutive records of one response each and the same prompt are one prompt, as they are one row in training."""
    before: str | Messages | None = None
    for place, record in rows.read_records_of(source):
        if isinstance(record, Mapping) and "prompt" in record and not _MARKS & set(record):
            content = read_prompt(record["prompt"], place, "prompt")
            before = None
            yield Prompt(content, place, {name: value for name, value in record.items() if name != "prompt"})
            continue
        known = recognise(record, place)
        content = known.convert(record, place, None).prompt  # type: ignore[arg-type]
        if not (known.one_response_a_record and content == before):
            yield Prompt(content, place, {})
        before = content if known.one_response_a_record else None


def _objects(records: list[tuple[str, Any]], path: str) -> list[tuple[str, Mapping[str, Any]]]:
    for place, record in records:
        if not isinstance(record, Mapping):
            raise UserError(f"{place}: expected an object with named fields; write one JSON object per entry")
    if not records:
        raise UserError(f"{path}: has no rows; give a file with at least one")
    return records
