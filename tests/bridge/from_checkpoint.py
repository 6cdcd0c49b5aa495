"""Runs from one checkpoint, in every number format and with adapters. Results of NeMo's engine are kept in a file.

    PYTHONPATH=. python -m tests.bridge.from_checkpoint [FILE]    with NeMo installed: writes FILE, or else
                                                                  nemo_from_checkpoint.json

The installed engine creates the checkpoint, with weights that depend only on their names.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..train.runs import make_data
from .five_steps import fingerprint, run
from .nemo_results import write_results

RECORDED = Path(__file__).with_name("nemo_from_checkpoint.json")
NUM_STEPS = 3
SIZES = ("model.arch.hidden_size=64", "model.arch.ffn_hidden_size=128")  # which 8 bits take
SIMULATED = ("precision.fp8_simulation=true", "precision.first_last_layers_bf16=false")
FIRST_OVERFLOW = "precision.fp16_hysteresis=1"  # halves the scale
# Name -> objective, and overrides. Batches are drawn alike: sums in 16 bits depend on them.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp32": ("rao", ()),
    "KTO": ("kto", ()),
    "LoRA": ("dpo", ("model.peft.scheme=lora", "model.peft.lora.dim=4", "model.optim.lr=1e-2")),
    "bf16": ("rao", ("precision=bf16_mixed",)),
    "fp16": ("rao", ("precision=fp16_mixed",)),
    "fp16 with overflows": ("rao", ("precision=fp16_mixed", "precision.fp16_initial_loss_scale=4e6", FIRST_OVERFLOW)),
    **{
        name: ("rao", (f"precision=fp8_{name}", *SIMULATED))
        for name in ("delayed", "delayed_e4m3", "tensorwise", "blockwise", "mxfp8")
    },
}
ONE_STEP = (
    *("trainer.max_steps=1", "exp_manager.checkpoint_callback_params.save_last=true"),
    *("model.optim.lr=1e-30", "model.optim.sched.min_lr=0", "model.optim.sched.warmup_steps=0"),
)


def make_start(folder: Path, data: tuple[str, ...]) -> Path:
    """A checkpoint of weights by name, whose one step has changed nothing."""
    run("sft", folder, data, *SIZES, *ONE_STEP)
    return folder / "sft"


def course(name: str, folder: Path, data: tuple[str, ...], start: Path) -> dict[str, Any]:
    """A run's steps, and the sums of its reference policy, ``[responses, sums]``, the fewest responses first."""
    objective, extra = RUNS[name]
    common = (*SIZES, f"model.restore_from_path={start}", f"trainer.max_steps={NUM_STEPS}")
    made = run(objective, folder, data, *common, *extra)
    sums = sorted((np.load(path) for path in (folder / "reference").glob("*/*.npy")), key=len)
    return {
        "data": fingerprint(folder, objective),
        "steps": made,
        "reference": [[[float(f"{number:.8g}") for number in row] for row in rows] for rows in sums],
    }


def every_run() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        data = make_data(Path(made) / "data", 24)
        start = make_start(Path(made) / "start", data)
        return {name: course(name, Path(made) / name, data, start) for name in RUNS}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"], os.environ["OMP_NUM_THREADS"] = "false", "1"
    write_results(every_run(), RECORDED)
