"""Context parallelism: each rank of a group computes its own part of every sequence.

A sequence of T tokens is cut into 2 CP chunks, of which rank r has the r-th from the front and the r-th from the end,
in this order. Causal attention costs the same on every rank so, and it is how Megatron's rotary embeddings and
Transformer Engine's attention expect tokens to lie:

    CP 2    rank 0  [chunk 0, chunk 3]    rank 1  [chunk 1, chunk 2]

What follows for sums over a row: each rank adds up the places that it has, and :func:`summed` adds up the ranks.
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
    """(CP, this rank's number among its group's)."""
    return parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()


def chunks_of_rank(length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """``(start, end)`` in a sequence of ``length`` tokens, in the order in which the rank has them."""
    if size == 1:
        return [(0, length)]
    assert length % (2 * size) == 0, f"{length} tokens are no multiple of 2 x {size}"
    chunk = length // (2 * size)
    return [(number * chunk, (number + 1) * chunk) for number in (rank, 2 * size - 1 - rank)]


def part_of_rank(batch: MicroBatch, size: int, rank: int) -> MicroBatch:
    """The micro-batch of one context-parallel rank: tokens ``[B, T/CP]``, and the places that are there.

    Places count through what the rank has, and are -1 where another rank has them. Segments and all numbers of rows and
    prompts are still those of the whole micro-batch.
    """
    if size == 1:
        return batch
    num_sequences, length = batch.tokens.shape
    own = torch.cat([torch.arange(start, end) for start, end in chunks_of_rank(length, size, rank)])
    places = (torch.arange(num_sequences)[:, None] * length + own).flatten()
    # Its last entry is for -1, no place at all.
    here = torch.full((num_sequences * length + 1,), -1)
    here[places] = torch.arange(len(places))
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[:, own],
        labels=batch.labels[:, own],
        position_ids=batch.position_ids[:, own],
        prompt_places=here[batch.prompt_places],
        response_places=here[batch.response_places],
        all_prompt_places=_present(here[batch.all_prompt_places]),
        all_response_places=_present(here[batch.all_response_places]),
        boundary=here[batch.boundary],
        end=here[batch.end],
    )


def _present(places: Tensor) -> Tensor:
    return places[places >= 0]


def summed(parts: Tensor) -> Tensor:
    """The sum of the ranks' parts. Backward, each part has the whole gradient: every rank has the whole loss."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return parts
    return reduce_from_tensor_model_parallel_region(parts, group=parallel_state.get_context_parallel_group())


def whole_sequences(part: Tensor) -> Tensor:
    """``[T/CP, ...]`` of each rank -> ``[T, ...]`` in their order. Backward, the ranks' gradients are added up."""
    size, _ = size_and_rank()
    if size == 1:
        return part
    gathered = gather_from_sequence_parallel_region(part, group=parallel_state.get_context_parallel_group())
    chunks = gathered.chunk(2 * size)  # of rank 0, front and end; of rank 1 ...
    fronts, ends = chunks[0::2], chunks[1::2]
    return torch.cat([*fronts, *reversed(ends)])
