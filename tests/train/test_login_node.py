"""Training where GPU software is installed without a GPU: a container's on a login node, PyPI's torch on a laptop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..login_node import write_packages
from .runs import NO_CHECKPOINTS, TINY, steps

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_takes_the_cpu_and_no_kernel_of_packages_that_can_be_imported(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    write_packages(tmp_path / "packages")
    layout = ("data.packing=true", "data.prefix_sharing=true")  # with Transformer Engine's layers, FlexAttention's
    run = ("exp_manager.name=run", f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=2")
    shown = ("trainer.enable_progress_bar=true",)
    command = [sys.executable, "-W", "ignore", "-m", "tests.login_node", "train", "--config-name", "gpt_rao"]
    done = subprocess.run(
        [*command, *TINY, *NO_CHECKPOINTS, *data, *layout, *run, *shown],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no CUDA device, Megatron runs on the CPU" in done.stdout
    # Progress in a pipe: whole lines, with the metrics.
    lines = [line for line in done.stderr.splitlines() if re.match(r"reference|rao", line)]
    assert re.fullmatch(r"reference log-probs \(training\): 64 of 64 prompts in .*prompts/s", lines[0])
    assert re.fullmatch(r"rao: 2 of 2 steps in .*, loss [\d.e+]+, rao/target_error .*", lines[-1]) and len(lines) < 10
    assert "\r" not in done.stderr
    first, second = steps(tmp_path / "run")
    assert first["step"] == 1 and second["loss"] != first["loss"]
