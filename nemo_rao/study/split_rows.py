"""Split one source of rows into ``train.jsonl`` and ``held_out.jsonl``, which share no prompt.

Prompts are ordered by a digest of their content, and the first of them are held out: the split depends neither on the
order of the rows nor on a seed. Records are written unchanged, so that the recipe's keys for columns and rewards apply
to them as to the source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.formats import recognize
from nemo_rao.rows.reading import expand_paths, read_records_of
from nemo_rao.rows.view import Columns
from nemo_rao.runtime.files import written_atomically

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def split_rows(source: str, folder: Path, held_out: float, columns: Mapping[str, str]) -> None:
    """Write ``train.jsonl`` and ``held_out.jsonl``.

    Args:
        source: the rows, in any form of ``data.train_path``.
        folder: an existing directory.
        held_out: fraction of prompts to hold out; both files get at least one prompt.
        columns: see :func:`nemo_rao.rows.reading.read_rows`.

    Raises:
        UserError: a row cannot be read, or there are fewer than two prompts.
    """
    prompts = sorted({digest for digest, _ in _records(source, columns)})
    if len(prompts) < 2:
        raise UserError(f"{source}: has {len(prompts)} prompts, but a split needs at least two. Give more rows.")
    number = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
    kept_back = set(prompts[:number])
    with written_atomically(folder / TRAIN, folder / HELD_OUT) as (train, held):
        for digest, line in _records(source, columns):
            (held if digest in kept_back else train).write(line)


def _records(source: str, columns: Mapping[str, str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (digest of the prompt, line of JSON) of every record."""
    names = Columns(dict(columns))
    for path in expand_paths(source):
        for location, record in read_records_of(path):
            view = names.view(record, location)
            digest = _digest(recognize(view).convert(view, None))
            yield digest, json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _digest(row: Row) -> bytes:
    """Digest of what :func:`nemo_rao.rows.reading.same_prompt` compares."""
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt]
    content = json.dumps([prompt, dict(row.template_fields), row.plain_prompt], sort_keys=True)
    return hashlib.sha256(content.encode()).digest()
