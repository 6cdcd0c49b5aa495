"""Eight-bit rounding by looking numbers up: the independent source for nemo_rao.ops.float8 and what is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMIT = {E4M3: 448.0, E5M2: 57344.0}


def numbers(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a format that are not negative, by their codes 0, 1, 2, ..., which rise with them."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()]


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of the format, the one with the even code of two equally near; its largest beyond."""
    table = numbers(dtype)
    magnitude = values.double().abs().clamp(max=LIMIT[dtype])
    above = torch.searchsorted(table, magnitude.contiguous()).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, table[above], table[below]) * values.sign()


def through(values: Tensor, dtype: torch.dtype, scale: float | Tensor) -> Tensor:
    """Scaled, rounded, scaled back; float64."""
    scaled = values.float() * scale  # in fp32, as the casts of GPUs scale
    return nearest(scaled, dtype) / scale
