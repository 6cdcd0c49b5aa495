"""Causal masks for scaled dot product attention: one tensor, of which every layer and segment uses a part.

PyTorch converts a boolean mask to the queries' dtype, and keeps the result for the backward pass of each call: an
``[n, m]`` tensor per segment and layer. A mask of that dtype is kept without a copy. Whether a query sees a key depends
only on their distance, so masks of all sizes are parts of one.

Legend: ``n`` queries, the last of ``m`` keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In elements. On GPUs, fused kernels reject a mask whose first element or rows are not aligned.
_ALIGNED = 16
_shared: dict[tuple[torch.dtype, torch.device, int | None], Tensor] = {}


def causal_mask(
    num_queries: int, num_keys: int, *, dtype: torch.dtype, device: torch.device, window: int | None = None
) -> Tensor:
    """Return ``[n, m]``: 0 where a query sees a key, -inf elsewhere. A view of a shared tensor; do not modify it.

    Args:
        dtype: dtype of the queries.
        window: number of previous keys that a query sees; ``None``: all.
    """
    key = (dtype, device, window)
    rows, columns = _shared[key].shape if key in _shared else (0, 0)
    # A part begins at a multiple of 16 columns, and therefore up to 15 rows further down.
    if rows < num_queries + _ALIGNED or columns < num_keys:
        rows = max(rows, num_queries + _ALIGNED)
        columns = max(columns, -(-num_keys // _ALIGNED) * _ALIGNED)
        _shared[key] = _whole(rows, columns, dtype, device, window)
    further = (num_keys - num_queries) - (columns - rows)  # additional keys that the part's first query sees
    left = max(0, -(further // _ALIGNED) * _ALIGNED)
    top = further + left
    return _shared[key][top : top + num_queries, left : left + num_keys]


def _whole(rows: int, columns: int, dtype: torch.dtype, device: torch.device, window: int | None) -> Tensor:
    seen = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    if window is not None:
        seen = seen.triu(columns - rows - window)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
