"""Results of NeMo's engine to compare with: computed here if NeMo's environment exists, otherwise read from a file.

Rounding differs between CPUs. Most runs in fp32 amplify it little, and their recorded results hold on any CPU. Runs in
16 bits or fewer, and objectives with a kink at the start, amplify it more within a few steps.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CPU = "cpu"
ON_ANOTHER_CPU = (
    "recorded on another CPU, which rounds differently; make install, for NeMo's environment, compares here"
)


def cpu() -> str:
    """The name of this machine's CPU, and the instructions that PyTorch uses on it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def write_results(results: dict[str, Any], recorded: Path) -> None:
    """Write results to the file that is the first argument of the command, or else to the recorded one."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else recorded
    text = json.dumps({CPU: cpu()} | results)
    path.write_text(text.replace('], "', '],\n"').replace("}, {", "},\n{") + "\n")


def nemo_results(module: str, recorded: Path, folder: Path) -> tuple[dict[str, Any], bool]:
    """Results of ``python -m module`` with NeMo, and whether they are those of a CPU like this one."""
    python = _nemo_python()
    if python is not None:
        path = folder / recorded.name
        _output(python, "-m", module, str(path))
        return json.loads(path.read_text()), True
    found = json.loads(recorded.read_text())
    return found, found[CPU] == cpu()


def _nemo_python() -> Path | None:
    """Python of NeMo's environment: NEMO_PYTHON, or that of ``make install``; ``None`` if there is none.

    An environment that is named and has no NeMo, or that cannot import this package, fails: the recorded results must
    not silently take its place.
    """
    given = os.environ.get("NEMO_PYTHON")
    python = Path(given) if given else ROOT / ".venv" / "bin" / "python"
    if not given and not python.exists():
        return None
    asked = "from nemo_rao.config.engine_choice import NEMO, installed_engine; print(installed_engine() == NEMO)"
    has_nemo = _output(python, "-c", asked).strip() == "True"
    assert has_nemo or not given, f"NEMO_PYTHON={given}: has no NeMo"
    return python if has_nemo else None


def _output(python: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{python}: {done.stderr}"
    return done.stdout
