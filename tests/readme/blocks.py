"""The commands of README.md and docs/, extracted from their text."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a page in these languages; by default, those of a shell or without a language."""
    wanted, found, lines = (
        languages or ("", "bash", "sh", "shell"),
        [],
        iter(page.read_text().splitlines(keepends=True)),
    )
    for line in lines:
        if line.startswith("```"):
            block = "".join(itertools.takewhile(lambda inside: not inside.startswith("```"), lines))
            if line[3:].strip() in wanted:
                found.append(block)
    return found


def inline_code(page: Path) -> list[str]:
    """The code spans of a page's prose and tables."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose.replace("\\|", "|"))


def procedure(first_line: str) -> str:
    """The one block of all pages that begins with this line."""
    [found] = [block for page in PAGES for block in blocks(page) if block.startswith(first_line + "\n")]
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each ``nemo-rao`` command of a page, with a block's variables, such as ``$run``, filled in."""
    for block in blocks(page):
        variables: dict[str, str] = {}
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in line.split(" && "):
                if assigned := re.fullmatch(r'(\w+)="(.*)"', part.strip()):
                    variables[assigned[1]] = assigned[2]
                    continue
                for name, value in variables.items():
                    part = part.replace(f"${name}", value)
                if part.strip().startswith("nemo-rao "):
                    yield shlex.split(part, comments=True)[1:]
