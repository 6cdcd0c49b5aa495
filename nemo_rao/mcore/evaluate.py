"""The objective and its metrics over a whole data set, every prompt exactly once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.forward import evaluation_mode, forward_only
from nemo_rao.mcore.loss import for_schedule, means, micro_batch_loss, reduce_statistics
from nemo_rao.objectives.base import Objective


def evaluate(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    objective: Objective,
    objective_config: Any,
    vocab_size: int,
    kl_estimate: Tensor | None = None,
) -> dict[str, float]:
    """Compute mean loss and metrics of the current policy. A collective over all ranks.

    Args:
        model: this rank's model chunks; their mode is preserved.
        micro_batches: prompt indices of this data-parallel rank's micro-batches; their number may differ between ranks.
        make_micro_batch: prompt indices -> micro-batch.
        vocab_size: V without padding.
        kl_estimate: ``[]``, over the same data, for objectives that need it.

    Returns:
        name -> mean over the data, the same on every rank.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        loss = micro_batch_loss(
            output,
            batch,
            objective,
            objective_config,
            vocab_size=vocab_size,
            kl_estimate=kl_estimate,
        )
        return for_schedule(loss)[2]

    with evaluation_mode(model):
        outputs = forward_only(model, micro_batches, make_micro_batch=make_micro_batch, report=report)
    return means(reduce_statistics(outputs))
