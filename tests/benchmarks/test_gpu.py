"""`make gpu`: each part within its time, its result written at once; docs/gpu.md says what the results say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part, main, run_part
from benchmarks.gpu_page import GOALS, page
from benchmarks.gpu_parts import read_tests

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
ABOUT = {"device": "a GPU", "commit": "0123", "date": "2026-01-02", "dry_run": False, "versions": {"torch": "2.11"}}


def python(name: str, code: str, **more: Any) -> Part:
    return Part(name, "", 30, ("-c", code, "{output}"), **more)


def run(part: Part, folder: Path, limit: float = 30) -> dict[str, Any]:
    report = run_part(part, folder, about=ABOUT, dry_run=True, limit=limit)
    assert json.loads((folder / f"{part.name}.json").read_text()) == report
    assert {path.name for path in folder.iterdir()} == {f"{part.name}.json"}
    return report


WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"runs\": 1}')"


def test_a_part_has_its_figures_and_its_output(tmp_path: Path) -> None:
    report = run(python("steps", f"print('said'); {WRITE}"), tmp_path)
    assert (report["status"], report["figures"], report["output"]) == ("ok", {"runs": 1}, "said\n")


def test_a_part_that_fails_keeps_what_it_has_measured(tmp_path: Path) -> None:
    report = run(python("steps", f"{WRITE}; raise SystemExit(3)"), tmp_path)
    assert (report["status"], report["exit_code"], report["figures"]) == ("failed", 3, {"runs": 1})


def test_a_part_is_stopped_at_its_limit_with_all_that_it_has_started(tmp_path: Path) -> None:
    alive = tmp_path.parent / f"{tmp_path.name}_alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); {WRITE}; time.sleep(60)"
    report = run(python("steps", code), tmp_path, limit=2)
    assert (report["status"], report["figures"]) == ("timed out", {"runs": 1})
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists(), "what it has started goes on"


def test_a_command_that_is_stopped_keeps_what_its_part_has_measured(tmp_path: Path) -> None:
    part = "import time; " + WRITE + "; print('measured', flush=True); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path; from benchmarks import gpu\n"
        "gpu.has_gpu = lambda: True\n"
        f"gpu.PARTS = (gpu.Part('steps', '', 30, ('-c', {part!r}, '{{output}}')),)\n"
        "sys.exit(gpu.main(['--parts', 'steps', '--output', sys.argv[1]]))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=gpu.REPOSITORY, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "steps.partial").exists():
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    command.terminate()
    assert command.wait(timeout=30) == 128 + signal.SIGTERM
    report = json.loads((tmp_path / "steps.json").read_text())
    assert (report["status"], report["figures"]) == ("stopped", {"runs": 1})


def test_a_part_says_what_is_missing(tmp_path: Path) -> None:
    report = run(python("tests", "", needs=("no_such_package",)), tmp_path)
    assert report["status"] == "unavailable" and "no_such_package" in report["reason"]


def test_tests_are_read_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='why')\ndef test_c(): pass\n"
    )
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "{output}", str(tmp_path / "test_some.py"))
    folder = tmp_path / "results"
    folder.mkdir()
    report = run(Part("tests", "", 60, command, read=read_tests), folder)
    assert report["status"] == "failed" and report["figures"]["counts"] == {"passed": 1, "failure": 1, "skipped": 1}
    assert "assert 1 == 2" in report["figures"]["tests"]["test_some::test_b"]["message"]
    assert "`test_some::test_b` | failure" in page(folder)


def test_a_dry_run_has_other_arguments_than_a_gpu() -> None:
    part = Part("steps", "", 30, ("-m", "steps", "{output}"), on_gpu=("--large",), dry=("--toy",))
    assert part.arguments(Path("x"), dry_run=True) == [sys.executable, "-m", "steps", "x", "--toy"]
    assert part.arguments(Path("x"), dry_run=False) == [sys.executable, "-m", "steps", "x", "--large"]


def test_the_limits_are_under_seven_minutes() -> None:
    assert sum(part.limit for part in PARTS) < 7 * 60


def test_unknown_parts_and_machines_without_a_gpu_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    for given, said in ((["--parts", "steps,fp9"], "fp9"), ([], "--dry-run")):
        with pytest.raises(SystemExit):
            main(given)
        assert said in capsys.readouterr().err


def test_parts_are_chosen_and_the_rest_is_not_begun_without_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "PARTS", tuple(python(part.name, "") for part in PARTS))
    assert main(["--parts", "fp8,doctor", "--output", str(tmp_path), "--commit", "abc"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"doctor.json", "fp8.json"}
    assert json.loads((tmp_path / "fp8.json").read_text())["commit"] == "abc"
    capsys.readouterr()
    assert main(["--parts", "steps", "--output", str(tmp_path), "--seconds", "1"]) == 1
    assert "not started" in capsys.readouterr().out and not (tmp_path / "steps.json").exists()


# ---------------------------------------------------------------------------------------------------- the page


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == page(), "make gpu-page"


def _step(seconds: float, **more: float) -> dict[str, Any]:
    figures = {"seconds": [seconds], "tokens_per_second": 1e4, "tflops": 450.0, "mfu": 0.455, "peak_bytes": 2**36}
    return {**figures, "planned_bytes": 2**36, "peak_over_planned": 1.2, **more}


def test_the_page_compares_each_goal_with_what_was_measured(tmp_path: Path) -> None:
    scale = {"row": 2048, "shared_prompt": 1024, "shared_response": 256, "batch": 8}
    runs = {
        "steps": {"rao, bf16": _step(1.02), "sft, bf16": _step(1.0)},
        "fp8": {"rao, bf16": _step(1.0), "rao, fp8 delayed": _step(0.8), "rao, fp8 blockwise": {"failed": "a|b"}},
        "prefix_sharing": {"packed": _step(2.0), "packed, shared prompts": _step(1.0)},
    }
    for name, of_part in runs.items():
        report = {**ABOUT, "status": "ok", "seconds": 60.0, "limit_seconds": 65}
        figures = {"layers": 9, "scale": scale, "runs": of_part}
        (tmp_path / f"{name}.json").write_text(json.dumps({**report, "figures": figures}))
    text = page(tmp_path)
    cells = [
        line.split(" | ") for line in text.splitlines() if line.startswith(tuple(f"| {goal.text}" for goal in GOALS))
    ]
    assert [(measured, reached.rstrip(" |")) for _, measured, reached in cells] == [
        ("45.5%", "yes"),
        ("1.25", "**no**, 4% below"),
        ("1.020", "yes"),
        ("2.00", "yes"),
        ("1.20", "**no**, 9% above"),
        ("not measured", ""),
    ]
    assert "a GPU | 0123" in text and "a\\|b" in text and "Nothing has been run" not in text


def test_a_dry_run_is_not_compared_with_goals(tmp_path: Path) -> None:
    report = {**ABOUT, "dry_run": True, "device": "a CPU", "status": "ok", "seconds": 6.0, "limit_seconds": 600}
    scale = {"row": 64, "shared_prompt": 64, "shared_response": 8, "batch": 2}
    figures = {"layers": 3, "scale": scale, "runs": {"rao, bf16": _step(1.5), "sft, bf16": _step(1.0)}}
    (tmp_path / "steps.json").write_text(json.dumps({**report, "figures": figures}))
    text = page(tmp_path)
    assert "**Dry run on a CPU" in text and "The model has a toy size" in text
    assert "at most 1.03 | 1.500 | not compared |" in text and "**no**" not in text


def test_without_results_the_page_says_so_and_names_the_command(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "Nothing has been run on a GPU yet" in text and "run `make gpu`" in text
    assert text.count("not measured") == len(GOALS)
