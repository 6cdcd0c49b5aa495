"""Rows from files: records (``sources``) under our names (``view``), as their format has them (``formats``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from nemo_rao.batch import Row
from nemo_rao.errors import UserError
from nemo_rao.rows.formats import recognise
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
    """The rows of one or several sources, in order.

    Args:
        paths: a file, a glob, a folder written by ``Dataset.save_to_disk``, ``hf:NAME`` or ``hf:NAME:SPLIT``; or a
            list of these.
        reward_field: where the reward stands, if not where the format has it: a field of the response, or a path
            into it such as ``annotations.helpfulness.Rating``. It must then be there in every row. A list of these is
            an ensemble of reward models, whose mean is the reward.
        columns: our name of a field -> its name in the file (``{"prompt": "question"}``).
        ignore_fields: fields that are not read: names, or paths as ``Row.unused`` has them (``completions[].model``).
        on_bad: is given what is wrong with a record, which is then skipped; None: it is raised. A file that cannot be
            read is an error in any case.

    Raises:
        UserError: at once where a file is missing or ``reward_field``, ``columns`` or ``ignore_fields`` name nothing;
            while reading, for whatever is wrong with a row.
    """
    names = [reward_field] if isinstance(reward_field, str) else reward_field
    if names is not None and not (names and all(names)):
        raise UserError(
            f"data.reward_field={reward_field!r} names no field; name one, or a list for an ensemble, or set it to null"
        )
    renaming = Columns(dict(columns or {}), tuple(ignore_fields), tuple(names or ()))
    sources = expand_paths(paths)
    return (row for source in sources for row in _rows_of_source(source, reward_field, renaming, on_bad))


def _rows_of_source(source: str, reward_field: RewardField, columns: Columns, on_bad: OnBad | None) -> Iterator[Row]:
    """Rows of one source. Consecutive records of one response each and the same prompt become one row."""
    open_row: Row | None = None
    for place, record in read_records_of(source, on_bad):
        try:
            view = columns.view(record, place)
            known = recognise(view)
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
    """Whether both ask the same."""
    return (one.prompt, one.template_fields, one.plain_prompt) == (
        other.prompt,
        other.template_fields,
        other.plain_prompt,
    )
