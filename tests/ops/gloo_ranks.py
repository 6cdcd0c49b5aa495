"""Run a function on several gloo ranks, forked from the running test so that nothing is imported again."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[[], Any], world_size: int) -> list[Any]:
    """What ``function()`` returns on each rank of a fresh default group. A rank's exception is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, world_size, folder)
        mp.start_processes(_rank, args=arguments, nprocs=world_size, start_method="fork")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, function: Callable[[], Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)  # ranks share the machine; and a forked OpenMP pool of the parent's would hang
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60)
    )
    try:
        torch.save(function(), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
