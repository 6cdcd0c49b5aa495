"""Long work, batch after batch, that is kept and shown while it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nemo_rao.generation.policy import Policy
from nemo_rao.runtime.part_file import PartFile
from nemo_rao.runtime.progress import Progress


def work_through(
    part: PartFile, items: Sequence[Any], at_once: int, produce: Callable[[Sequence[Any]], list[Any]], label: str
) -> None:
    """Produces the records of all items that ``part`` does not have, and shows how far it is.

    Items are grouped by their numbers, ``at_once`` to a group, whether or not work is resumed within a group: what a
    batch is made of, which the last bits of its logits depend on, is then the same.
    """
    with Progress(label, unit="prompt", total=len(items), done=part.num_records, stays=False) as progress:
        while (done := part.num_records) < len(items):
            start = done - done % at_once
            records = produce(items[start : start + at_once])
            part.append(records[done - start :])
            progress.update(part.num_records)


def print_notes(policy: Policy, remarks: Mapping[str, int] = MappingProxyType({})) -> None:
    """Prints what the policy has to say, and what was noticed about prompts, with their number."""
    for line in [*policy.notes, *(f"{count} {remark}" for remark, count in remarks.items())]:
        print(policy.settings.OPTIONS(line), flush=True)
