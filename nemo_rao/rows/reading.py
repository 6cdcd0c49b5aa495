"""Rows from files: records (``sources``) under canonical names (``view``), converted by format (``formats``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.formats import recognize
from nemo_rao.rows.rewards import RewardField
from nemo_rao.rows.sources import HUB, JSON_LINES, OnBad, Paths, expand_paths, is_saved_dataset, read_records_of
from nemo_rao.rows.view import Columns

__all__ = [
    "HUB",
    "JSON_LINES",
    "OnBad",
    "Paths",
    "expand_paths",
    "is_saved_dataset",
    "read_records_of",
    "read_rows",
    "same_prompt",
]


def read_rows(
    paths: Paths,
    *,
    reward_field: RewardField = None,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Sequence[str] = (),
    on_bad: OnBad | None = None,
) -> Iterator[Row]:
    """Iterate over the rows of one or several sources, in order.

    Args:
        paths: a file, a glob, a directory written by ``Dataset.save_to_disk``, ``hf:NAME`` or ``hf:NAME:SPLIT``; or a
            list of these.
        reward_field: field of the reward if it differs from the format's own: a field of the response, or a path into
            it such as ``annotations.helpfulness.Rating``. Every row must then have it. A list is an ensemble of reward
            models, whose mean is the reward.
        columns: canonical field name -> name in the file (``{"prompt": "question"}``).
        ignore_fields: fields to skip: names, or paths in the form of ``Row.unused`` (``completions[].model``).
        on_bad: called with the error of a bad record, which is then skipped; ``None``: it is raised. An unreadable file
            is always an error.

    Raises:
        UserError: immediately if a file is missing or ``reward_field``, ``columns`` or ``ignore_fields`` are invalid;
            while reading, for an invalid row.
    """
    names = [reward_field] if isinstance(reward_field, str) else reward_field
    if names is not None and not (names and all(names)):
        raise UserError(
            f"data.reward_field={reward_field!r} names no field. Name one, a list for an ensemble, or set it to null."
        )
    renaming = Columns(dict(columns or {}), tuple(ignore_fields), tuple(names or ()))
    sources = expand_paths(paths)
    return (row for source in sources for row in _rows_of_source(source, reward_field, renaming, on_bad))


def _rows_of_source(source: str, reward_field: RewardField, columns: Columns, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of one source. Consecutive one-response records with the same prompt become one row."""
    open_row: Row | None = None
    for location, record in read_records_of(source, on_bad):
        try:
            view = columns.view(record, location)
            known = recognize(view)
            row = known.convert(view, reward_field)
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)
            continue
        if open_row is not None:
            if known.one_response_a_record and same_prompt(open_row, row):
                open_row = dataclasses.replace(
                    open_row,
                    responses=open_row.responses + row.responses,
                    unused=tuple(dict.fromkeys(open_row.unused + row.unused)),
                )
                continue
            yield open_row
            open_row = None
        if known.one_response_a_record:
            open_row = row
        else:
            yield row
    if open_row is not None:
        yield open_row


def same_prompt(one: Row, other: Row) -> bool:
    """Whether both rows have the same prompt."""
    return (one.prompt, one.template_fields, one.plain_prompt) == (
        other.prompt,
        other.template_fields,
        other.plain_prompt,
    )
