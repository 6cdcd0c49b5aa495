"""Hook of MkDocs (mkdocs.yml): draws the formulas of a page, ``$...$`` and ``$$...$$``, as SVG; breaks names in tables.

KaTeX and MathJax are usual, and loaded from a network when a page is read, or copied into the site with a megabyte of
fonts. MathML needs neither, but without a mathematical font on the reader's machine brackets and sums are drawn badly.
ziamath draws TeX with its own font when the site is built: a reader needs no network, script or font.
"""

from __future__ import annotations

import html
import re
from typing import Any

import ziamath

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_SIZE = 17.0  # pixels; text is 16
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>([^<]{16,})</code>")


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with its formulas drawn, and with long names in tables that may break behind ``.`` and ``_``."""
    content = _INLINE.sub(lambda found: _drawn(found[1], "span"), content)
    content = _DISPLAY.sub(lambda found: _drawn(found[1], "div"), content)
    return _CELL.sub(lambda cell: _CODE.sub(_breakable, cell[0]), content)


def _breakable(code: re.Match[str]) -> str:
    return f"<code>{re.sub(r'(?<=[._=:/])(?=[^._=:/])', '<wbr>', code[1])}</code>"


def _drawn(tex: str, element: str) -> str:
    """A formula as SVG in the text's colour, on the text's baseline; its TeX is read aloud and found by the search."""
    tex = html.unescape(tex).strip()
    formula = ziamath.Latex(tex, size=_SIZE, inline=element == "span", color="currentColor")
    text = html.escape(tex)
    drawing = formula.svg().replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
    style = f"--baseline: {formula.getyofst():.2f}px"
    return f'<{element} class="formula" style="{style}">{drawing}<span hidden>{text}</span></{element}>'
