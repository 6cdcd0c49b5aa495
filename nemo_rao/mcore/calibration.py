"""Calibration of delayed scaling, so that scales are right before the first results.

A new quantized layer has scale 1. Weights of 0.02 are then cast near the smallest normal number of e4m3, 2^-6, and
small ones lose most of their digits. Pre-training forgets its first micro-batch. But a reference policy computed with
such scales would stay in the loss to the end of the run, and the policy, with other scales from its second micro-batch
on, would differ from it without having learned anything.

So the first step's micro-batches are run forward before the reference pass, and the resulting scales are kept: the pass
and the first step cast alike. They are run until their results stop changing, since the activations of a layer under
scale 1 differ slightly from those under the scale that follows. With ``fp8_amax_compute_algo=max`` over a history
longer than these passes, scales do not change within the first step, which contains nothing new, and
rho = log pi - log pi_ref is exactly 0 in it. With ``most_recent`` this holds only for its first micro-batch.

Scales of gradients are not calibrated: this would need a loss, which needs the reference. At scale 1 the smallest
gradients of the first micro-batch or two round to 0 in 8-bit layers, as they do in pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.forward import forward_only

MOST_PASSES = 8


def calibrate(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
) -> int:
    """Run micro-batches forward as in training until their results stop changing. A collective over all ranks.

    Args:
        model: this rank's model chunks, in training mode.
        micro_batches: prompt indices of each; equally many on every data-parallel rank, because each ends with a
            reduction of amax values over these and the tensor-parallel ranks.
        make_micro_batch: prompt indices -> micro-batch.

    Returns:
        the number of passes, at most :data:`MOST_PASSES`.
    """

    def numbers(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        shown = next(part for part in (output.scores, output.hidden, output.logits) if part is not None)
        return {"sum": shown.detach().double().sum()}

    before: list[float] = []
    for done in range(1, MOST_PASSES + 1):
        with torch.enable_grad():  # histories are updated only with gradients enabled
            outputs = forward_only(model, micro_batches, make_micro_batch=make_micro_batch, report=numbers)
        now = [float(output["sum"]) for output in outputs]
        changed = torch.tensor(float(done == 1 or now != before))
        if torch.cuda.is_available():
            changed = changed.cuda()
        torch.distributed.all_reduce(changed)
        if not changed:
            return done
        before = now
    return MOST_PASSES
