"""Run a function on several gloo ranks, forked from the running test so that nothing is imported again."""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_rao.runtime.launch import launch


def run_ranks(function: Callable[[], Any], world_size: int) -> list[Any]:
    """Results of ``function()`` on each rank of a new default group. An error names the first rank to fail."""
    with tempfile.TemporaryDirectory() as folder:
        # The launcher runs a single rank in its own process, so an idle second rank is added.
        launch(_rank, (function, world_size, folder), num_ranks=max(world_size, 2))
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank(function: Callable[[], Any], world_size: int, folder: str) -> None:
    rank = int(os.environ["RANK"])
    if rank >= world_size:
        return
    torch.set_num_threads(1)  # ranks share the machine; and a forked OpenMP pool of the parent's would hang
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60)
    )
    torch.save(function(), Path(folder, f"{rank}.pt"))
    dist.barrier()
