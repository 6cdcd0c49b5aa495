"""Quantised layers remember: amax histories and scales. Who only looks leaves them as they were.

Delayed scaling casts under a scale made of the largest values of *earlier* micro-batches. That state is each module's
extra state (``get_extra_state``, ``_extra_state`` in a checkpoint), of Transformer Engine's layers and of simulated
ones (:mod:`nemo_rao.mcore.fp8_simulation`) alike. A reference pass, a validation or a pass over mismatched rows runs
the layers too, and the largest values that they see would count in the next scales: a run would depend on how often
it was validated. Transformer Engine moves its histories on under gradients alone, but its casts note what they see
always.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor, nn


@contextlib.contextmanager
def quantisation_kept(model: Sequence[Any]) -> Iterator[None]:
    """Whatever runs inside, every module's extra state is afterwards what it was before, bit for bit.

    Args:
        model: this rank's model chunks.
    """
    kept = list(_states(model))
    try:
        yield
    finally:
        for module, state in kept:
            module.set_extra_state(state)


def quantisation_fingerprint(model: Sequence[Any]) -> str:
    """Hash what all ranks' quantised layers remember; empty where none does. A collective over all ranks.

    Returns:
        16 hexadecimal digits, the same on every rank, or "".
    """
    own = hashlib.sha256()
    count = 0
    for _, state in _states(model):
        own.update(state.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        count += 1
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own.digest() if count else b"")
    joined = b"".join(every)
    return hashlib.sha256(joined).hexdigest()[:16] if joined else ""


def _states(model: Sequence[Any]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Modules that remember something, and what: a tensor, of bytes where it is Transformer Engine's."""
    for chunk in model:
        config = get_model_config(chunk)
        if config.fp8 is not None and config.fp8_recipe != "delayed":
            continue  # Transformer Engine's layers have a state then that says nothing of what they have seen
        for module in chunk.modules():
            if type(module).get_extra_state is nn.Module.get_extra_state:
                continue
            state = module.get_extra_state()
            if isinstance(state, Tensor) and state.numel():  # layers that are not quantised have None, or nothing in it
                yield module, state
