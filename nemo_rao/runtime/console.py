"""Console output of a run: its own lines, and only those of libraries that matter to a user."""

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
# Loggers that warn about intended behavior.
_WARY = ("megatron.core.rerun_state_machine", "megatron.core.dist_checkpointing", "megatron.core.optimizer")


def global_rank() -> int:
    """Return this process's rank in the run; 0 for the parent of forked ranks."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_first_rank() -> bool:
    """Whether this process prints for the run: the parent of forked ranks, or rank 0 of ranks started externally."""
    return global_rank() == 0


def say(line: str) -> None:
    """Print a line on one rank only."""
    if is_first_rank():
        print(line, flush=True)


@functools.cache
def warn_once(line: str) -> None:
    """Print a warning on stderr, once per run. Not with ``warnings``, which engines silence on import."""
    if is_first_rank():
        print(f"warning: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Suppress messages of an engine and its dependencies about missing optional parts while importing them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), uncollected_imports():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def quiet_third_parties() -> None:
    """Limit libraries to warnings, so that the console shows the run's lines."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _WARY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|nemo|megatron|torch")
