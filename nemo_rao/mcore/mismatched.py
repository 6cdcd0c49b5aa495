"""Distance of the policy from the reference on responses that do not belong to their prompts.

It estimates the divergence between the two, from which KTO's z0 is computed. It is a number of the whole *global*
batch, so that a loss does not depend on how the batch is split: a separate forward-only pass before the step computes
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.first_step import LogRatios
from nemo_rao.mcore.forward import evaluation_mode, forward_only
from nemo_rao.mcore.loss import reduce_statistics, sequence_log_probs

_LOG_RATIO = "log_ratio"


def mean_log_ratio(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    vocab_size: int,
    log_ratios: LogRatios | None = None,
) -> Tensor:
    """Compute the mean over mismatched rows of rho(y') = log pi(y'|x) - log pi_ref(y'|x). A collective over all ranks.

    Args:
        model: this rank's model chunks; their mode is preserved.
        micro_batches: prompt indices of this data-parallel rank's micro-batches; their number may differ between ranks.
        make_micro_batch: prompt indices -> micro-batch of mismatched rows, with their reference log-probs.
        vocab_size: V without padding.
        log_ratios: collects the log-ratios of rows, in the first step.

    Returns:
        ``[]`` float32, nats, the same on every rank.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        assert batch.reference is not None
        _, response_logps = sequence_log_probs(output, batch, vocab_size=vocab_size, prompts=False)
        log_ratio = response_logps - batch.reference[:, 1]
        if log_ratios is not None:
            log_ratios.add_rows(log_ratio, batch.response_lengths)
        return {_LOG_RATIO: torch.stack([log_ratio.sum(), log_ratio.new_tensor(len(log_ratio))])}

    with evaluation_mode(model):
        outputs = forward_only(model, micro_batches, make_micro_batch=make_micro_batch, report=report)
    total, count = reduce_statistics(outputs, names=[_LOG_RATIO])[_LOG_RATIO]
    return (total / count).float()
