"""A report as a list of blocks, written as Markdown with figures beside it, or as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from nemo_rao.runtime.files import write_atomically

MARK = '<meta name="generator" content="nemo-rao report">'  # by which a page is known that may be replaced
FIGURES = "figures"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; ``is_warning``: shown as such."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text; columns behind the first ``num_labels`` are numbers.

    Attributes:
        folded: shown in HTML once it is opened, below this line.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_labels: int = 1
    folded: str | None = None


@dataclass(frozen=True)
class Figure:
    """An SVG drawing; ``name`` becomes a file's."""

    name: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be typed, or text of a model."""

    text: str
    folded: str | None = None


Block = Heading | Text | Table | Figure | Code


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: of the page.
        blocks: in order.
    """

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def write_markdown(document: Document, path: Path) -> None:
    """Write the page, and its figures into ``figures`` beside it."""
    for block in document.blocks:
        if isinstance(block, Figure):
            write_atomically(path.parent / FIGURES / f"{block.name}.svg", block.svg)
    write_atomically(path, markdown(document))


def markdown(document: Document) -> str:
    parts = [f"# {document.title}"]
    for block in document.blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text, is_warning):
                parts.append(f"**{text}**" if is_warning else text)
            case Table():
                ruled = [
                    block.header,
                    [*["---"] * block.num_labels, *["---:"] * (len(block.header) - block.num_labels)],
                ]
                lines = [
                    " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row)
                    for row in (*ruled, *block.rows)
                ]
                parts.append("\n".join(f"| {line} |" for line in lines))
            case Figure(name, _, caption):
                parts.append(f"![{caption}]({FIGURES}/{name}.svg)\n\n{caption}")
            case Code(text):
                longest = max(map(len, re.findall("`+", text)), default=0)
                fence = "`" * max(3, longest + 1)
                parts.append(f"{fence}\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"


def html(document: Document) -> str:
    """The page: no script, nothing loaded from elsewhere, all text escaped."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    # Drawings have styles of their own, attributes of their elements.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; style-src-attr 'unsafe-inline'"
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(document.title)}</title><style>{_STYLE}</style></head><body><main>"
    )
    body = "\n".join(part for block in document.blocks for part in _html_of(block))
    return f"{head}<h1>{escape(document.title)}</h1>\n{body}\n</main></body></html>\n"


def _html_of(block: Block) -> Iterator[str]:
    match block:
        case Heading(text, level):
            yield f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, is_warning):
            for part in text.split("\n\n"):
                yield f"<p{' class=warning' if is_warning else ''}>{escape(part)}</p>"
        case Table():
            table = "".join(_table(block))
            yield f"<details><summary>{escape(block.folded)}</summary>{table}</details>" if block.folded else table
        case Figure(_, svg, caption):
            yield f'<figure role="img" aria-label="{escape(caption)}">{_without_metadata(svg)}'
            yield f"<figcaption>{escape(caption)}</figcaption></figure>"
        case Code(text, folded):
            code = f"<pre>{escape(text)}</pre>"
            yield f"<details><summary>{escape(folded)}</summary>{code}</details>" if folded else code


def _table(block: Table) -> Iterator[str]:
    yield '<div class="wide"><table><thead><tr>'
    for at, cell in enumerate(block.header):
        yield f"<th{_kind(at, block)}>{escape(cell)}</th>"
    yield "</tr></thead><tbody>"
    for row in block.rows:
        yield "<tr>" + "".join(f"<td{_kind(at, block)}>{escape(cell)}</td>" for at, cell in enumerate(row)) + "</tr>"
    yield "</tbody></table></div>"


def _kind(column: int, block: Table) -> str:
    return "" if column < block.num_labels else " class=number"


def _without_metadata(svg: str) -> str:
    """Without matplotlib's description of itself, and without its style element, which would be the whole page's."""
    return re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)


_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fbfbf9; color: #1d2127; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .5rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.warning { background: #fbeae6; color: #a33423; border-radius: 8px; padding: .55rem .8rem; max-width: none; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; border: 1px solid #dfe2e6; margin: .6rem 0; font-size: .92rem; }
th, td { padding: .35rem .75rem; text-align: left; border-top: 1px solid #dfe2e6; vertical-align: top; }
td { overflow-wrap: anywhere; }
th { background: #f1f2f0; border-top: 0; vertical-align: bottom; font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
figure { margin: 1rem 0; background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: .8rem; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { color: #5d6672; font-size: .88rem; margin-top: .4rem; }
pre { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: .7rem .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: .7rem 0; } summary { cursor: pointer; color: #2f5fb3; }
"""
