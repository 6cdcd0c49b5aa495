"""Terminal output of a run: its own lines, and only those of the libraries that matter to a user."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from nemo_rao.runtime.collector import uncollected_imports

# Loggers that report every routine step at INFO.
_CHATTY = (
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning.utilities.rank_zero",
    "lightning_utilities.core.rank_zero",
    "nv_one_logger",
    "torch.distributed",
)
# Loggers that warn of what is meant to be so.
_WARY = ("megatron.core.rerun_state_machine", "megatron.core.dist_checkpointing", "megatron.core.optimizer")


def global_rank() -> int:
    """This process's rank in the run; 0 for the parent of forked ranks."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_first_rank() -> bool:
    """Whether this process speaks for the run: the parent of forked ranks, or rank 0 of those started from outside."""
    return global_rank() == 0


def say(line: str) -> None:
    """One line for the user, once for a run."""
    if is_first_rank():
        print(line, flush=True)


@functools.cache
def warn_once(line: str) -> None:
    """A warning on standard error, once for a run; not of Python's ``warnings``, which imports of engines silence."""
    if is_first_rank():
        print(f"warning: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """For imports of an engine: what it and its dependencies report of optional parts that are absent is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), uncollected_imports():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quiet_third_parties() -> None:
    """Leave the terminal to the run's own lines: libraries may still warn of something, but not inform."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _WARY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|nemo|megatron|torch")
