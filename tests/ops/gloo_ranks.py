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
    """What ``function()`` returns on each rank of a fresh default group. The first rank to fail is named here."""
    with tempfile.TemporaryDirectory() as folder:
        # The launcher starts a single rank in its own process: there a second one keeps it company, idle.
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
