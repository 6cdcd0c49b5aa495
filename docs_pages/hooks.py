"""Hooks of MkDocs (mkdocs.yml): formulas of a page, ``$...$`` and ``$$...$$``, are drawn as SVG, long names in tables
may break, and files at the top of the repository, such as CONTRIBUTING.md, are pages, too.

KaTeX and MathJax are usual, and loaded from a network when a page is read, or copied into the site with a megabyte of
fonts. MathML needs neither, but without a mathematical font on the reader's machine brackets and sums are drawn badly.
ziamath draws TeX with its own font when the site is built: a reader needs no network, script or font.
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
    """The site's files with those of the repository."""
    root = Path(config.config_file_path).parent
    for name, page in OF_REPOSITORY.items():
        files.append(File.generated(config, page, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Their links lead to pages; what is no page, such as LICENSE, is named alone."""
    if page.file.src_uri not in OF_REPOSITORY.values():
        return markdown
    for name, target in OF_REPOSITORY.items():
        markdown = markdown.replace(f"]({name})", f"]({Path(target).name})")
    markdown = re.sub(r"^   (?=\s*\S)", "    ", markdown, flags=re.MULTILINE)  # within numbered lists MkDocs wants four
    markdown = markdown.replace("](docs/", "](../")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|\.\./|[a-z_]+\.md)[^)]*\)", r"\1", markdown)


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
