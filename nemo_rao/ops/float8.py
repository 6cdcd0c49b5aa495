"""Rounding to 8-bit floating point as in Transformer Engine: a scale per tensor or block, then the cast.

    scaled = x * scale            scale: as large as the format's range allows
    q      = cast(clamp(scaled))  e4m3: 4 bits of exponent, 3 of mantissa, up to 448; e5m2: 5 and 2, up to 57344
    x~     = q / scale            what a product sees; sums are in fp32

The scale is computed from the largest magnitude (amax) as in ``compute_scale_from_amax`` of Transformer Engine, and
``float_to_e8m0`` for MXFP8. Shape legend: ``[M, K]`` an fp32 matrix; blocks at the edges may be smaller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

_EXPONENT = -(1 << 23)  # 0xff800000: sign and exponent of an fp32 number
_BELOW_EXPONENT = (1 << 23) - 1
LARGEST_SCALE = torch.finfo(torch.float32).max


def largest(dtype: torch.dtype) -> float:
    """Return the largest number of an 8-bit format."""
    return torch.finfo(dtype).max


def rounded(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``values`` with ``scale`` and back; values beyond the format's range become its largest number.

    Args:
        values: fp32.
        scale: fp32 of a shape that broadcasts to that of ``values``.

    Returns:
        fp32.
    """
    limit = largest(dtype)
    return (values * scale).clamp(-limit, limit).to(dtype).float() * (1 / scale)


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_2: bool = False) -> Tensor:
    """Return the scale that maps ``amax`` to the format's largest number; 1 where it is 0 or not finite.

    Args:
        power_of_2: round the scale down to a power of 2, so that scaling itself is exact.
    """
    scale = (largest(dtype) / amax).clamp(max=LARGEST_SCALE)
    if power_of_2:
        scale = (scale.view(torch.int32) & _EXPONENT).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def e8m0_scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return MXFP8's scale: the inverse of amax / (the format's largest number), rounded up to a power of 2.

    So ``amax`` never exceeds the range. 1 where it is 0 or not finite.
    """
    relative = amax * (1 / largest(dtype))
    # Adding all bits below the exponent carries into it unless they are 0.
    up = ((relative.view(torch.int32) + _BELOW_EXPONENT) & _EXPONENT).view(torch.float32)
    up = up.clamp(min=2.0**-126)
    return torch.where((amax > 0) & amax.isfinite(), 1 / up, torch.ones_like(up))


def block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the largest magnitude of each block of ``[M, K]``: ``[ceil(M / rows), ceil(K / columns)]``."""
    rows, columns = block
    padded = F.pad(values.abs(), (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax(dim=(1, 3))


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Expand scales per block to scales per number, ``[M, K]``."""
    rows, columns = block
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
