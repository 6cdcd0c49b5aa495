"""One small data set and one starting checkpoint for all tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .runs import TINY, make_data, run_training


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    """A run of two fine-tuning steps, whose checkpoint the others start from."""
    folder = tmp_path_factory.mktemp("start")
    run_training(
        "gpt_sft", [*TINY, *data, f"exp_manager.exp_dir={folder}", "exp_manager.name=sft", "trainer.max_steps=2"]
    )
    return folder / "sft"


# A test's row (objective, metric, before, after) goes with its report, from whichever process to the one that prints.
ROW = "row of the table of objectives"


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Called with the cells of this test's row of the table that is printed at the end of the session."""
    return lambda *cells: request.node.user_properties.append((ROW, cells))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [cells for report in reports for name, cells in report.user_properties if name == ROW]
    if not rows:
        return
    terminalreporter.section("every objective, 20 steps on 2 ranks (TP 2)")
    rows = [("objective", "its metric", "before", "after"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
