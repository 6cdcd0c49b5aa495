"""Shared by all tests: an environment that survives forks, and the table at the end of the session."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

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
    parser.addoption("--no-engine", action="store_true", help="block imports of NeMo, Lightning and Megatron-Bridge")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-engine"):
        from nemo_rao.config import engine_choice

        sys.modules.update(dict.fromkeys(ENGINE_PACKAGES))  # type: ignore[arg-type]
        engine_choice.installed_engine = lambda: None  # it looks for directories, which exist


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests on machines without a GPU."""
    from nemo_rao.runtime.gpus import has_gpu

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


# A test's row of the table is sent with its report, from the process that runs it to the one that prints.
ROW = "row of the table of objectives"


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that takes the cells of this test's row in the table printed at the end of the session."""
    return lambda *cells: request.node.user_properties.append((ROW, cells))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    rows = [cells for report in reports for name, cells in report.user_properties if name == ROW]
    if not rows:
        return
    terminalreporter.section("every objective, 20 steps on 2 ranks")
    rows = [("objective", "layout", "its metric", "before", "after"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
