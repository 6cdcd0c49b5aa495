"""A small checkpoint of each engine, from which runs start on either.

    PYTHONPATH=. python -m tests.train.starts          with one engine installed: writes ENGINE.tar.xz anew

An archive has a checkpoint of two fine-tuning steps, whole as the engine leaves it, optimizer and NeMo's context
included (``start/``), and the steps that a run on the same engine takes from there on one rank (``steps.json``).
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from nemo_rao.checkpoint.find import last_checkpoint

from ..runs import FOUR_LAYERS, NO_CHECKPOINTS, make_data, run_training, steps

FOLDER = Path(__file__).parent
SMALL = (
    *FOUR_LAYERS,
    "model.arch.hidden_size=8",
    "model.arch.ffn_hidden_size=16",
    "model.arch.num_attention_heads=2",
    "model.arch.extra.make_vocab_size_divisible_by=4",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "trainer.max_epochs=null",
)


def data(folder: Path) -> tuple[str, ...]:
    return make_data(folder, 16)


def unpack(engine: str, folder: Path) -> Path:
    """``start/`` and ``steps.json`` of a checkpoint that ``engine`` wrote, in ``folder``."""
    with tarfile.open(FOLDER / f"{engine}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(start: Path, folder: Path, given: tuple[str, ...]) -> list[dict[str, float]]:
    """Three steps of RAO from a checkpoint."""
    run_training(
        "gpt_rao",
        [
            *SMALL,
            *NO_CHECKPOINTS,
            *given,
            "trainer.max_steps=3",
            f"model.restore_from_path={start}",
            f"exp_manager.exp_dir={folder}",
            "exp_manager.name=rao",
        ],
    )
    return steps(folder / "rao")


def write(engine: str, folder: Path) -> None:
    given = data(folder / "data")
    names = ["trainer.max_steps=2", f"exp_manager.exp_dir={folder}", "exp_manager.name=sft"]
    run_training("gpt_sft", [*SMALL, *given, *names])
    written = last_checkpoint(folder / "sft")
    assert written is not None
    shutil.copytree(written, folder / "start")
    (folder / "steps.json").write_text(json.dumps(run(folder / "start", folder, given), indent=1))
    with tarfile.open(FOLDER / f"{engine}.tar.xz", "w:xz") as archive:
        for name in ("start", "steps.json"):
            archive.add(folder / name, name, filter=_without_owner)


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
