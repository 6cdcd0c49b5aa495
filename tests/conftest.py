"""What all tests share: an environment that survives forks, and the table at the end of the session."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# Before anything is imported: tests fork ranks, and neither of these thread pools survives a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

# What engines are made of; megatron-core is not among them.
ENGINE_PACKAGES = ("nemo", "nemo_run", "lightning", "pytorch_lightning", "megatron.bridge")

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slurm", action="store_true", help="also the tests that run jobs on a real SLURM")
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="parity over every parallelism and layout of the batch, not a selection of them: some ten minutes more",
    )
    parser.addoption("--no-engine", action="store_true", help="imports of NeMo, Lightning and Megatron-Bridge fail")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-engine"):
        from nemo_rao.config import engine_choice

        sys.modules.update(dict.fromkeys(ENGINE_PACKAGES))  # type: ignore[arg-type]
        engine_choice.installed_engine = lambda: None  # it looks for directories, which are there


# What trains, converts, plans or launches with the engine NeMo; not collected where it is not installed.
WITH_NEMO = (
    "benchmarks",
    "cli",
    "hugging_face",
    "launch",
    "pipeline",
    "planning",
    "readme",
    "recipes",
    "slurm",
    "train",
)
HAS_NEMO = importlib.util.find_spec("nemo") is not None
TESTS = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    left_out = not HAS_NEMO and collection_path.parent == TESTS and collection_path.name in WITH_NEMO
    return left_out or None  # None: pytest's own rules decide


def _note_of_nemo() -> list[str]:
    """How many files of tests are left out. Counted anew: under xdist the process that prints collects nothing."""
    if HAS_NEMO:
        return []
    number = sum(len(list((TESTS / name).glob("test_*.py"))) for name in WITH_NEMO)
    return [f"NeMo is not installed: {number} files of tests, in {', '.join(WITH_NEMO)}, are not collected"]


@pytest.fixture
def gpu_packages_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets packages for GPUs be found though an earlier test has put Megatron on the CPU in this process."""
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# A test's row of the table goes with its report, from whichever process runs it to the one that prints.
ROW = "row of the table of objectives"


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Called with the cells of this test's row of the table that is printed at the end of the session."""
    return lambda *cells: request.node.user_properties.append((ROW, cells))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _note_of_nemo():
        terminalreporter.write_line(line)
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [cells for report in reports for name, cells in report.user_properties if name == ROW]
    if not rows:
        return
    terminalreporter.section("every objective, 20 steps on 2 ranks")
    rows = [("objective", "layout", "its metric", "before", "after"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
