"""One data set with its tokenizer, and every model imported and exported once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..train.runs import make_data
from .models import MODELS, command, import_converter, make_model


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and tokenizer/."""
    folder = tmp_path_factory.mktemp("hf_data")
    make_data(folder, 16)
    return folder


class Converted:
    """The folders of one model: ``source``, ``imported`` and ``exported``."""

    def __init__(self, source: Path, imported: Path, exported: Path) -> None:
        self.source, self.imported, self.exported = source, imported, exported


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Converted]:
    import_converter()
    made = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp("hf")
        source = make_model(name, data / "tokenizer", folder / "source")
        made[name] = Converted(source, folder / "imported", folder / "exported")
        command("import-hf", source, folder / "imported")
        command("export-hf", folder / "imported", folder / "exported")
    return made
