"""Forward pass over all rows of a rollout, with results gathered on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.data.order import every_sample_once
from nemo_rao.mcore.forward import evaluation_mode, forward_only


def rollout_reports(
    chunks: Sequence[Any],
    num_slots: int,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    *,
    micro_batch_size: int,
    report: Callable[[ModelOutput, MicroBatch], dict[str, Tensor]],
) -> list[dict[str, np.ndarray]]:
    """Run a forward pass over a rollout. A collective over all ranks, which all get the result.

    Args:
        chunks: this rank's model chunks; their training mode is restored.
        num_slots: number of slots of the rollout.
        make_micro_batch: slots of the rollout -> micro-batch.
        micro_batch_size: slots.
        report: see :func:`nemo_rao.mcore.forward.forward_only`.

    Returns:
        the result of ``report`` for each micro-batch, in arbitrary order.
    """
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    own = every_sample_once(num_slots, micro_batch_size, rank, size)
    with evaluation_mode(chunks):
        reports = forward_only(chunks, own, make_micro_batch=make_micro_batch, report=report)
    # Of the ranks with the same rows, one sends them; only the last pipeline stage has reports.
    sends = parallel_state.get_tensor_and_context_parallel_rank() == 0
    mine = [{name: values.cpu().numpy() for name, values in one.items()} for one in reports if sends]
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, mine)
    return [one for of_rank in of_ranks for one in of_rank]
