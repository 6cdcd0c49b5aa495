"""docs/objectives.md says what the code does."""

from pathlib import Path

import pytest

from nemo_rao.cli import main
from nemo_rao.objectives.registry import OBJECTIVES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_page_is_the_one_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["objectives"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, "nemo-rao objectives > docs/objectives.md"


def test_every_objective_has_one_row_of_six_cells() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(OBJECTIVES)
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}
