"""docs/precision.md says what the figures say, about every format and every key."""

import dataclasses
import json
from pathlib import Path

from benchmarks.precision import FORMATS
from benchmarks.precision_page import page
from benchmarks.results import FOLDER
from nemo_rao.config.compose import package_recipes
from nemo_rao.config.run_config import PrecisionConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "precision.md"


def test_the_page_is_made_of_the_figures() -> None:
    assert PAGE.read_text() == page(), "make precision-page"


def test_every_format_is_measured() -> None:
    report = json.loads((FOLDER / "precision.json").read_text())
    assert list(report["formats"]) == list(FORMATS)


def test_every_file_and_every_key_of_fp8_is_listed() -> None:
    text = PAGE.read_text()
    names = [path.stem for path in package_recipes().glob("precision/*.yaml")]
    names += [
        field.name for field in dataclasses.fields(PrecisionConfig) if "fp8" in field.name or "bf16" in field.name
    ]
    assert [name for name in names if f"`{name}`" not in text] == []
