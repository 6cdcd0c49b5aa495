"""Tables of the pages that are generated from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1) -> str:
    """A Markdown table; the first ``num_text`` columns are left-aligned, the others right-aligned."""
    lines = [header, [*["---"] * num_text, *["---:"] * (len(header) - num_text)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
