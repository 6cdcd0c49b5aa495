"""Shared by the scoring tests: rows, a judge's file, and the command in an empty directory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.cli import main
from tests.scoring.judge_server import JudgeServer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty. Rules that a test writes there are forgotten after it."""
    monkeypatch.chdir(tmp_path)
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if (sys.modules[name].__dict__.get("__file__") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        yield server


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``nemo-rao score``; returns the exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["score", *arguments])
        return code, *capfd.readouterr()

    return run


def write_rows(path: str | Path, num_rows: int = 6, num_responses: int = 2) -> None:
    """Rows whose response k of prompt i is the number (i + k) % 10."""
    write_lines(
        path,
        *(
            {
                "prompt": f"prompt {i}",
                "responses": [{"content": f"answer {(i + k) % 10} of {i}.{k}"} for k in range(num_responses)],
            }
            for i in range(num_rows)
        ),
    )


def write_lines(path: str | Path, *rows: Any) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write_judge(url: str, path: str = "judge.yaml", **keys: Any) -> str:
    """A judge that answers quickly or not at all. Returns the scorer argument."""
    settings = {
        "base_url": url,
        "model": "small",
        "template": "<prompt>{prompt}</prompt><response>{response}</response> {other} {}",
        "low": 0,
        "high": 10,
        "backoff": 0.01,
        "retries": 2,
        "timeout": 20,
    }
    Path(path).write_text(json.dumps(settings | keys))  # JSON is YAML
    return f"judge:{path}"


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)
