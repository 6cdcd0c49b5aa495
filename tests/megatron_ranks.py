"""Megatron on local ranks for tests: it and the engine are imported once in the test process, ranks are forks of it.

Ranks are started by the project's own launcher, so that a failing rank shows its own traceback.
"""

from __future__ import annotations

import importlib
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def import_once() -> None:
    """What every rank needs, imported before the first fork. Takes about 20 s, once for a test session."""
    import torch

    from nemo_rao.config.engine_choice import installed_engine
    from nemo_rao.mcore import cpu
    from nemo_rao.runtime.collector import uncollected_imports

    torch.set_num_threads(1)  # a fork after torch has started threads can hang
    with uncollected_imports():
        cpu.install_if_needed()
        import megatron.core.models.gpt.gpt_model
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules  # noqa: F401

        if (name := installed_engine()) is not None:
            importlib.import_module(f"nemo_rao.engines.{name}.engine").load()


def run_ranks(function: Callable[..., Any], args: Sequence[Any] = (), *, num_ranks: int) -> list[Any]:
    """``function(*args)`` on every rank, in the environment that the launcher gives; the ranks' results in order."""
    import_once()
    from nemo_rao.runtime.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        if num_ranks == 1:  # the launcher would run it here, in the test's own process
            launch(_two_or_one, (function, args, folder), num_ranks=2)
        else:
            launch(_keep_result, (function, args, folder), num_ranks=num_ranks)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _two_or_one(function: Callable[..., Any], args: Sequence[Any], folder: str) -> None:
    """A single rank, in a process of its own: the second one has nothing to do."""
    import os

    if os.environ["RANK"] == "0":
        os.environ["WORLD_SIZE"] = "1"
        _keep_result(function, args, folder)


def _keep_result(function: Callable[..., Any], args: Sequence[Any], folder: str) -> None:
    import os

    result = function(*args)
    (Path(folder) / os.environ["RANK"]).write_bytes(pickle.dumps(result))


def init_megatron(*, tensor: int = 1, pipeline: int = 1, seed: int = 1234) -> None:
    """Process groups and seeds of one rank, without NeMo's trainer. To be called inside a rank."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor, pipeline)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
