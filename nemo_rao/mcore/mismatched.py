"""How far the policy has moved from the reference on responses that do not belong to their prompts.

An estimate of the divergence between the two (KTO's z0 is made of it). It is a number of the whole *global* batch, so
that a loss does not depend on how the batch is split: it is computed by a forward-only pass of its own before the step.
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
    """The mean over mismatched rows of rho(y') = log pi(y'|x) - log pi_ref(y'|x). A collective over all ranks.

    Args:
        model: this rank's model chunks; left in the mode they came in.
        micro_batches: prompt numbers of this data-parallel rank's micro-batches; ranks may have different numbers.
        make_micro_batch: prompt numbers -> micro-batch of mismatched rows, with their reference log-probs.
        vocab_size: V without padding.
        log_ratios: collects the rows' own, in the first step.

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
