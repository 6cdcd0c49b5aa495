"""How checkpoints lie on disk: those of this project's runs, on either engine, and Megatron-Bridge's own.

NAME/weights/       torch_dist, of a run on either engine; the model's names begin with "module."
NAME/critic/        likewise of a critic that is a model of its own, with its optimizer
NAME/context/       tokenizer; on NeMo, what else it keeps
iter_0000100/       torch_dist, of Megatron-Bridge itself, without that prefix; latest_checkpointed_iteration.txt is
                    beside it
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CRITIC = "critic"

_PREFIX = "module."
# What a checkpoint holds besides the model, where the model's names have no prefix.
_BESIDES = ("optimizer.", "chained_", "common_state", "rng_state", "rerun_state", "opt_param_scheduler")
_LATEST = "latest_checkpointed_iteration.txt"


def weights_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's tensors."""
    return checkpoint if (checkpoint / ".metadata").is_file() else checkpoint / "weights"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of one of these layouts."""
    return (folder / "weights").is_dir() or (folder / ".metadata").is_file()


def latest_of_bridge(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that Megatron-Bridge itself saves to; ``None`` where it is none."""
    file = folder / _LATEST
    latest = file.read_text().strip() if file.is_file() else ""
    found = folder / f"iter_{int(latest):07d}" if latest.isdigit() else folder / latest
    return found if latest and is_checkpoint(found) else None


def names_of_model(stored: Iterable[str]) -> dict[str, str]:
    """Of the names in a checkpoint, the model's -> the same without a prefix."""
    names = list(stored)
    prefixed = {name: name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)}
    return prefixed or {name: name for name in names if not name.startswith(_BESIDES)}
