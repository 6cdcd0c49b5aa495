"""Batch processing with progress display and resumable results."""

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
    """Produce the records of all items missing from ``part``, with a progress bar.

    Items are grouped by their index, ``at_once`` per group, even if work is resumed within a group. The composition of
    batches, on which the last bits of their logits depend, is then the same.
    """
    with Progress(label, unit="prompt", total=len(items), done=part.num_records, stays=False) as progress:
        while (done := part.num_records) < len(items):
            start = done - done % at_once
            records = produce(items[start : start + at_once])
            part.append(records[done - start :])
            progress.update(part.num_records)


def print_notes(policy: Policy, remarks: Mapping[str, int] = MappingProxyType({})) -> None:
    """Print the policy's notes, and remarks on prompts with their counts."""
    for line in [*policy.notes, *(f"{count} {remark}" for remark, count in remarks.items())]:
        print(policy.settings.OPTIONS(line), flush=True)
