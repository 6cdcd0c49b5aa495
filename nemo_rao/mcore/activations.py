"""Activation functions by the names of :data:`nemo_rao.config.families.ACTIVATIONS`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from megatron.core.activations import fast_gelu, quick_gelu
from torch import Tensor

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": fast_gelu,
    "quick_gelu": quick_gelu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the elementwise function for Megatron's ``activation_func``."""
    return _FUNCTIONS[name]
