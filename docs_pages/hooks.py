"""MkDocs hooks (mkdocs.yml): draw formulas, ``$...$`` and ``$$...$$``, as SVG, allow line breaks in long names in
tables, and add files at the top of the repository, such as CONTRIBUTING.md, as pages.

The usual choices, KaTeX and MathJax, are loaded from the network when a page is read, or add a megabyte of fonts to the
site. MathML needs neither, but brackets and sums look bad without a math font on the reader's machine. ziamath draws
TeX with its own font when the site is built, so a reader needs no network, script or font.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import ziamath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Files of the repository -> pages of the site.
OF_REPOSITORY = {
    f"{name}.md": f"project/{name.lower()}.md" for name in ("CHANGELOG", "CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")
}

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_SIZE = 17.0  # pixels; text is 16
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)
_CODE = re.compile(r"<code>([^<]{16,})</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files to those of the site."""
    root = Path(config.config_file_path).parent
    for name, page in OF_REPOSITORY.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Make links of the repository's files point to pages; links to other files, such as LICENSE, become plain text."""
    if page.file.src_uri not in OF_REPOSITORY.values():
        return markdown
    for name, target in OF_REPOSITORY.items():
        markdown = markdown.replace(f"]({name})", f"]({Path(target).name})")
    markdown = re.sub(r"^   (?=\s*\S)", "    ", markdown, flags=re.MULTILINE)  # MkDocs indents lists by four spaces
    markdown = markdown.replace("](docs/", "](../")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|\.\./|[a-z_]+\.md)[^)]*\)", r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with formulas as SVG, and with allowed line breaks in long names in tables."""
    content = _INLINE.sub(lambda found: _drawn(found[1], "span"), content)
    content = _DISPLAY.sub(lambda found: _drawn(found[1], "div"), content)
    return _CELL.sub(lambda cell: _CODE.sub(_breakable, cell[0]), content)


def _breakable(code: re.Match[str]) -> str:
    return f"<code>{re.sub(r'(?<=[._=:/])(?=[^._=:/])', '<wbr>', code[1])}</code>"


def _drawn(tex: str, element: str) -> str:
    """A formula as SVG in the text's color, on its baseline; screen readers and the search get its TeX."""
    tex = html.unescape(tex).strip()
    formula = ziamath.Latex(tex, size=_SIZE, inline=element == "span", color="currentColor")
    text = html.escape(tex)
    drawing = formula.svg().replace("<svg ", f'<svg role="img" aria-label="{text}" ', 1)
    style = f"--baseline: {formula.getyofst():.2f}px"
    return f'<{element} class="formula" style="{style}">{drawing}<span hidden>{text}</span></{element}>'
