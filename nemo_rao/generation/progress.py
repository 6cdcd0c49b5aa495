"""A long work, batch after batch, and how far it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_rao.part_file import PartFile


def work_through(
    part: PartFile, items: Sequence[Any], at_once: int, produce: Callable[[Sequence[Any]], list[Any]], label: str
) -> None:
    """Produces the records of all items that ``part`` does not have, and shows how far it is.

    Items are grouped by their numbers, ``at_once`` to a group, whether or not work is resumed within a group: what a
    batch is made of, which the last bits of its logits depend on, is then the same.
    """
    with progress(label, len(items), part.num_records) as advance:
        while (done := part.num_records) < len(items):
            start = done - done % at_once
            records = produce(items[start : start + at_once])
            part.append(records[done - start :])
            advance(part.num_records - done)


@contextlib.contextmanager
def progress(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; called with the number of items just finished."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
