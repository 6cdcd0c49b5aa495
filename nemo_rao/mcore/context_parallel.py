"""Context parallelism: each rank of a group computes its part of every sequence.

A sequence of T tokens is split into 2 CP chunks; rank r has the r-th from the front and the r-th from the end, in this
order. Causal attention then costs the same on every rank, and Megatron's rotary embeddings and Transformer Engine's
attention expect this layout:

    CP 2    rank 0  [chunk 0, chunk 3]    rank 1  [chunk 1, chunk 2]

Consequence for sums over a row: each rank sums over the positions that it has, and :func:`summed` sums over ranks.
"""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from nemo_rao.batch import MicroBatch


def size_and_rank() -> tuple[int, int]:
    """Return (CP, this rank's index in its group)."""
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()


def chunks_of_rank(length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of the rank's chunks of a sequence of ``length`` tokens, in the rank's order."""
    if size == 1:
        return [(0, length)]
    assert length % (2 * size) == 0, f"{length} tokens are not a multiple of 2 x {size}"
    chunk = length // (2 * size)
    return [(number * chunk, (number + 1) * chunk) for number in (rank, 2 * size - 1 - rank)]


def part_of_rank(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """Return the micro-batch of one context-parallel rank: tokens ``[B, T/CP]``, and the positions on the rank.

    Positions index the rank's tokens, and are -1 for tokens on other ranks. Segments and all numbers of rows and
    prompts are still those of the whole micro-batch.
    """
    if size == 1:
        return batch
    num_sequences, length = batch.tokens.shape
    own = torch.cat([torch.arange(start, end) for start, end in chunks_of_rank(length, size, rank)])
    positions = (torch.arange(num_sequences)[:, None] * length + own).flatten()
    # Its last entry is for -1, no position.
    here = torch.full((num_sequences * length + 1,), -1)
    here[positions] = torch.arange(len(positions))
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:, own],
        labels=batch.labels[:, own],
        position_ids=batch.position_ids[:, own],
        prompt_positions=here[batch.prompt_positions],
        response_positions=here[batch.response_positions],
        all_prompt_positions=_present(here[batch.all_prompt_positions]),
        all_response_positions=_present(here[batch.all_response_positions]),
        boundary=here[batch.boundary],
        end=here[batch.end],
    )


def _present(positions: Tensor) -> Tensor:
    return positions[positions >= 0]


def summed(parts: Tensor) -> Tensor:
    """Sum the ranks' parts. Backward, each part gets the whole gradient, because every rank has the whole loss."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return parts
    return reduce_from_tensor_model_parallel_region(parts, group=parallel_state.get_context_parallel_group())


def whole_sequences(part: Tensor) -> Tensor:
    """Gather ``[T/CP, ...]`` of each rank to ``[T, ...]`` in order. Backward, the ranks' gradients are summed."""
    size, _ = size_and_rank()
    if size == 1:
        return part
    gathered = gather_from_sequence_parallel_region(part, group=parallel_state.get_context_parallel_group())
    chunks = gathered.chunk(2 * size)  # front and end of rank 0, of rank 1, ...
    fronts, ends = chunks[0::2], chunks[1::2]
    return torch.cat([*fronts, *reversed(ends)])
