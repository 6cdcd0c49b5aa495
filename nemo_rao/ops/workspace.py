"""Memory that log-probabilities hold at a time, in bytes: plain arithmetic, for the operations and the planner.

Shape legend: ``N`` tokens that are computed, ``n`` tokens and ``c`` vocabulary columns of one block; ``F`` features.
"""

from __future__ import annotations

import math

CHUNK_BYTES = 128 * 2**20
"""Default size of a chunk of logits in fp32, if logits are materialized (:mod:`nemo_rao.ops.vocab_parallel`)."""

CPU_WORKSPACE_BYTES = 24 * 2**20
"""Default size of a block if they are not (:mod:`nemo_rao.ops.linear_log_probs`): it should stay in the caches."""

CUDA_WORKSPACE_BYTES = 512 * 2**20
"""Default size of a block on a GPU, where products should be large."""

CUDA_TILE = 256
"""Blocks on a GPU are multiples of this number of tokens and columns: the larger side of cuBLAS's tiles."""


def cell_and_side(num_features: int, itemsize: int, read_itemsize: int) -> tuple[int, int]:
    """Return the bytes of a block per logit (it has ``n c``) and per token or column (it has ``n + c``).

    A logit is held in both dtypes if they differ; a token or column as the copy ``[F]`` that is read, and as much again
    for a sum or for gathering it.

    Args:
        itemsize: bytes of a number in logits and sums.
        read_itemsize: bytes of a number that products read.
    """
    apart = read_itemsize if read_itemsize != itemsize else 0
    return itemsize + apart, (2 * itemsize + apart) * num_features


def block_sizes(
    num_tokens: int,
    num_columns: int,
    num_features: int,
    workspace_bytes: int,
    itemsize: int,
    read_itemsize: int,
    *,
    multiple: int = 1,
) -> tuple[int, int]:
    """Return tokens n and columns c of a block, at least one each, as close to a square as budget and totals allow.

    Args:
        workspace_bytes: budget of a block.
        itemsize, read_itemsize: see :func:`cell_and_side`.
        multiple: both sizes are multiples of it, if there are several blocks and the budget allows it.
    """
    cell, side = cell_and_side(num_features, itemsize, read_itemsize)
    square = int((math.sqrt(side**2 + cell * workspace_bytes) - side) / cell)  # cell n^2 + 2 side n = workspace

    def other(size: int) -> int:
        return max(1, (workspace_bytes - size * side) // (size * cell + side))

    width = min(max(1, num_columns), other(max(1, min(square, num_tokens))))
    num_rows = _evenly(num_tokens, min(max(1, num_tokens), other(width)), multiple)
    # Columns use the rest of the budget: sums over the vocabulary are then accumulated less often.
    width = min(max(1, num_columns), other(num_rows))
    return num_rows, _evenly(num_columns, width, multiple)


def _evenly(length: int, size: int, multiple: int) -> int:
    """Return the size of parts of nearly equal length, as many as with parts of ``size``."""
    if length <= size:
        return max(1, length)
    if size < multiple:
        multiple = 1
    size -= size % multiple
    return math.ceil(length / math.ceil(length / size) / multiple) * multiple
