"""The script that types README.md's commands gives all of them to the programs, in their order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .blocks import PAGES, commands
from .type_readme import script

# Stands for make, python and nemo-rao: writes down its arguments; fails where the test asks for it.
SHIM = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({log!r}, "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + chr(10))
sys.exit(os.environ.get("FAILS") in sys.argv[1:2])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone in which the demonstration has run and a model has been imported, and programs that only write."""
    clone = tmp_path / "nemo_rao"
    for name in (".venv/bin/activate", "runs/demo/data/train.jsonl", "llama/model/imported.yaml"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("")
    (tmp_path / "bin").mkdir()
    for name in ("make", "python", "nemo-rao"):
        (tmp_path / "bin" / name).write_text(SHIM.format(python=sys.executable, log=str(tmp_path / "log")))
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def typed(folder: Path, **environment: str) -> tuple[int, list[list[str]]]:
    """Exit code, and the arguments of every program."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    code = subprocess.run(["bash", "-c", script(folder, Path("venv"))], env=environment, capture_output=True).returncode
    return code, [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_every_command_is_typed_in_its_order(folder: Path) -> None:
    code, given = typed(folder)
    assert code == 0
    ours = [words[1:] for words in given if words[0] == "nemo-rao"]
    expected = list(commands(PAGES[0]))
    assert len(ours) == len(expected) > 5
    for words, readme in zip(ours, expected, strict=True):
        same = [a == b or "/" in b for a, b in zip(words, readme, strict=False)]  # paths are the test's
        assert len(words) >= len(readme) and all(same), words
    assert [words[-1] for words in given if words[0] == "make" and "demo" in words] == ["demo"]
    assert ["--dry-run" in words for words in ours] == ["launch" in words for words in ours]
    assert not any(word.startswith(("/models", "/data", "/checkpoints", "/path")) for words in ours for word in words)


def test_the_first_command_that_fails_ends_it(folder: Path) -> None:
    code, given = typed(folder, FAILS="import-hf")
    assert code != 0
    assert [words[1] for words in given if words[0] == "nemo-rao"][-1] == "import-hf"
