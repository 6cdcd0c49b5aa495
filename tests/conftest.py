"""Shared by all tests: an environment that survives forks, and the table at the end of the session."""

import contextlib
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything is imported: tests fork ranks, and neither of these thread pools survives a fork.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# Keep bytecode even if the caller disables it: commands and forks would otherwise compile the package every time.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
sys.dont_write_bytecode = False
# Checking for a GPU must not initialize CUDA, as forks follow.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# A shell's background job ignores SIGINT, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Packages of the engines, without megatron-core.
ENGINE_PACKAGES = ("nemo", "nemo_run", "lightning", "pytorch_lightning", "megatron.bridge")

with contextlib.suppress(ModuleNotFoundError):  # a GPU machine may have only pytest, for tests/gpu
    import hypothesis

    # No deadline, as machines may be busy. Examples are the same in each run; `--hypothesis-profile search` tries more.
    hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
    hypothesis.settings.register_profile("search", deadline=None, max_examples=5000)
    hypothesis.settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slurm", action="store_true", help="also run the tests that need a real SLURM")
    parser.addoption("--vllm", metavar="PYTHON", help="also run the tests that sample with this Python's vLLM")
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="test parity for all parallelisms and batch layouts, not a selection: about ten minutes more",
    )
    parser.addoption("--gpu-dry-run", action="store_true", help="run tests/gpu on the CPU, as far as possible")
    parser.addoption("--write-seconds", action="store_true", help="write files' CPU seconds to tests/seconds.json")
    parser.addoption("--no-engine", action="store_true", help="block imports of NeMo, Lightning and Megatron-Bridge")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-engine"):
        from nemo_rao.config import engine_choice

        sys.modules.update(dict.fromkeys(ENGINE_PACKAGES))  # type: ignore[arg-type]
        engine_choice.installed_engine = lambda: None  # it looks for directories, which exist


# File -> CPU seconds of its tests and their fixtures, including the processes that they start, as --write-seconds has
# measured them. Wall-clock time would depend on the load of the machine.
SECONDS = Path(__file__).with_name("seconds.json")
SPENT = pytest.StashKey[float]()

# What tests/conftest.py adds to reports travels as their user properties, from the process that runs a test to the one
# that prints and writes.
ROW = "row of the table of objectives"
CPU_SECONDS = "CPU seconds since the report before"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave the tests and what they import out of garbage collection, here and in the ranks that tests fork."""
    from nemo_rao.runtime.collector import uncollected_imports

    with uncollected_imports():
        return (yield)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[SPENT] = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the CPU seconds since the previous report of this process to each of a test's reports."""
    report = yield
    before = item.config.stash[SPENT]
    item.config.stash[SPENT] = now = sum(os.times()[:4])
    report.user_properties.append((CPU_SECONDS, now - before))
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests on machines without a GPU; processes that share the files begin with the longest ones."""
    from nemo_rao.runtime.gpus import has_gpu

    if "PYTEST_XDIST_WORKER" in os.environ:
        seconds = _seconds()
        # A file without an entry is new and may be long: it is not left for the end. The sort is stable, so all
        # processes, which must collect in the same order, agree on files with equal seconds.
        items.sort(key=lambda item: -seconds.get(_file(item.nodeid), 30.0))
    if config.getoption("--gpu-dry-run") or not any(item.get_closest_marker("gpu") for item in items) or has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; --gpu-dry-run runs it on the CPU as far as possible"))


@pytest.fixture
def gpu_packages_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make GPU packages importable even if an earlier test has put Megatron on the CPU in this process."""
    for name in ("transformer_engine", "transformer_engine_torch", "apex", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that takes the cells of this test's row in the table printed at the end of the session."""
    return lambda *cells: request.node.user_properties.append((ROW, cells))


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _seconds() -> dict[str, float]:
    """The entries of :data:`SECONDS`; none if the file does not exist yet."""
    entries: dict[str, float] = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    return entries


def _properties(reports: Iterable[pytest.TestReport], name: str) -> Iterator[tuple[pytest.TestReport, Any]]:
    """Each report with the value of each of its user properties of this name."""
    return ((report, value) for report in reports for own, value in report.user_properties if own == name)


def _write_seconds(reports: Iterable[pytest.TestReport]) -> None:
    """Update the entries of the files that ran; drop those of files that no longer exist."""
    measured: dict[str, float] = defaultdict(float)
    for report, spent in _properties(reports, CPU_SECONDS):
        measured[_file(report.nodeid)] += spent
    seconds = _seconds() | measured
    there = {name: round(took, 1) for name, took in seconds.items() if (SECONDS.parents[1] / name).exists()}
    ordered = sorted(there.items(), key=lambda one: (-one[1], one[0]))
    SECONDS.write_text(json.dumps(dict(ordered), indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--write-seconds"):
        done = [report for reports in terminalreporter.stats.values() for report in reports]
        _write_seconds([report for report in done if isinstance(report, pytest.TestReport)])
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [cells for _, cells in _properties(reports, ROW)]
    if not rows:
        return
    terminalreporter.section("every objective, 20 steps on 2 ranks")
    rows = [("objective", "layout", "its metric", "before", "after"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
