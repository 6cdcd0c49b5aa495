"""Layouts of checkpoints on disk: those of this project's runs, on either engine, and Megatron-Bridge's.

NAME/weights/       torch_dist, of a run on either engine; the model's names begin with "module."
NAME/critic/        the same for a critic that is a separate model, with its optimizer
NAME/context/       tokenizer; with NeMo, also its other files
iter_0000100/       torch_dist, written by Megatron-Bridge itself, without that prefix;
                    latest_checkpointed_iteration.txt is beside it
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CRITIC = "critic"

_PREFIX = "module."
# Other entries of a checkpoint in which the model's names have no prefix.
_BESIDES = ("optimizer.", "chained_", "common_state", "rng_state", "rerun_state", "opt_param_scheduler")
_LATEST = "latest_checkpointed_iteration.txt"


def weights_of(checkpoint: Path) -> Path:
    """Return the directory of a checkpoint's tensors."""
    return checkpoint if (checkpoint / ".metadata").is_file() else checkpoint / "weights"


def is_checkpoint(folder: Path) -> bool:
    """Whether a directory is a checkpoint of one of these layouts."""
    return (folder / "weights").is_dir() or (folder / ".metadata").is_file()


def latest_of_bridge(folder: Path) -> Path | None:
    """Return the newest checkpoint in a directory written by Megatron-Bridge itself; ``None`` if it is not one."""
    file = folder / _LATEST
    latest = file.read_text().strip() if file.is_file() else ""
    found = folder / f"iter_{int(latest):07d}" if latest.isdigit() else folder / latest
    return found if latest and is_checkpoint(found) else None


def names_of_model(stored: Iterable[str]) -> dict[str, str]:
    """Map the model's names in a checkpoint to the same without a prefix."""
    names = list(stored)
    prefixed = {name: name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)}
    return prefixed or {name: name for name in names if not name.startswith(_BESIDES)}
