"""State of quantized layers: amax histories and scales. Evaluation leaves it unchanged.

Delayed scaling casts with a scale computed from the largest values of *earlier* micro-batches. This is each module's
extra state (``get_extra_state``, ``_extra_state`` in a checkpoint), both for Transformer Engine's layers and for
simulated ones (:mod:`nemo_rao.mcore.fp8_simulation`). A reference pass, a validation or a pass over mismatched rows
runs the layers, too, and the largest values that it sees would affect the next scales: a run would depend on how often
it was validated. Transformer Engine shifts its histories only with gradients enabled, but its casts always record
values.
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
def quantization_kept(model: Sequence[Any]) -> Iterator[None]:
    """Restore every module's extra state after the block, bit for bit.

    Args:
        model: this rank's model chunks.
    """
    kept = list(_states(model))
    try:
        yield
    finally:
        for module, state in kept:
            module.set_extra_state(state)


def quantization_fingerprint(model: Sequence[Any]) -> str:
    """Hash the state of all ranks' quantized layers; empty if there is none. A collective over all ranks.

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
    """Yield modules with extra state, and the state: a tensor, which consists of bytes for Transformer Engine."""
    for chunk in model:
        config = get_model_config(chunk)
        if config.fp8 is not None and config.fp8_recipe != "delayed":
            continue  # the state of Transformer Engine's layers then does not depend on their inputs
        for module in chunk.modules():
            if type(module).get_extra_state is nn.Module.get_extra_state:
                continue
            state = module.get_extra_state()
            # Layers that are not quantized have None or an empty tensor.
            if isinstance(state, Tensor) and state.numel():
                yield module, state
