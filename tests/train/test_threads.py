"""``trainer.threads_per_rank`` sets the CPU threads of a run, which engines would otherwise change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from .runs import NO_CHECKPOINTS, TINY, _train, in_fork


@pytest.mark.parametrize(("given", "threads"), [("null", 1), ("3", 3)])
def test_a_run_uses_as_many_threads_as_its_recipe_says(
    given: str, threads: int, data: tuple[str, ...], tmp_path: Path
) -> None:
    run = [*TINY, *data, *NO_CHECKPOINTS, "trainer.max_steps=1", f"exp_manager.exp_dir={tmp_path}"]
    in_fork(train_and_count_threads, [*run, f"trainer.threads_per_rank={given}"], threads)


def train_and_count_threads(given: Sequence[str], threads: int) -> None:
    import torch

    from nemo_rao.loop.session import Hook, Session

    counted = []

    class Count(Hook):
        def start(self, session: Session) -> None:
            counted.append(torch.get_num_threads())

    # All tests run with this variable, users without it; and four cores, of which there may be fewer here.
    os.environ.pop("OMP_NUM_THREADS", None)
    with mock.patch("os.cpu_count", lambda: 4), mock.patch("os.sched_getaffinity", lambda _: {0, 1, 2, 3}):
        _train("gpt_sft", given, hooks=lambda hooks: [*hooks, Count()])
    assert counted == [threads]
