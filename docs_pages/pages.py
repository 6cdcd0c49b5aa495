"""The generated pages of docs/ and the modules that generate them.

    python -m docs_pages            # write all of them
    python -m docs_pages --check    # write none; exit code 1 if one is stale

``make docs`` checks them before it builds the site.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"

# Page -> the module whose function ``page`` returns its text. Imported one by one: some import transformers.
OF_CODE: Mapping[str, str] = {
    "guides/moving.md": "docs_pages.moving",
    "reference/commands.md": "docs_pages.commands",
    "reference/keys.md": "docs_pages.keys",
    "reference/objectives.md": "docs_pages.objectives",
    "reference/other_names.md": "nemo_rao.other_names",
}
OF_RESULTS: Mapping[str, str] = {
    "families.md": "tests.bridge.families_page",
    "gpu.md": "benchmarks.gpu_page",
    "online_results.md": "benchmarks.online_page",
    "papers.md": "benchmarks.papers",
    "performance.md": "benchmarks.page",
    "precision.md": "benchmarks.precision_page",
}


def text(module: str) -> str:
    """The up-to-date text of a page."""
    return importlib.import_module(module).page()


def stale(pages: Mapping[str, str]) -> list[str]:
    """Pages whose file is missing or out of date."""
    return [
        name
        for name, module in pages.items()
        if not (DOCS / name).is_file() or (DOCS / name).read_text() != text(module)
    ]


def main(arguments: Sequence[str]) -> int:
    pages = {**OF_CODE, **OF_RESULTS}
    if "--check" in arguments:
        found = stale(pages)
        for name in found:
            print(f"error: docs/{name} is not up to date; run make docs-pages", file=sys.stderr)
        return 1 if found else 0
    for name, module in pages.items():
        (DOCS / name).write_text(text(module))
    return 0
