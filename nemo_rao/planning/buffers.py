"""Megatron's buffers of weights and gradients, and each data-parallel rank's shard of the optimizer state: exact.

Megatron lays out trained parameters in reverse order, in buckets. With the distributed optimizer every parameter starts
at a multiple of 64 elements, every bucket ends at a multiple of lcm(DP, 128), weights live in a buffer of the same
layout, and rank r owns the r-th of DP equal parts of each bucket (ZeRO stage 1, Rajbhandari et al. 2020). The padding
is in the buffers, but not in the optimizer state. DP includes context-parallel ranks. Experts that are split over
ranks have separate buffers, sharded over the ranks that hold the same experts; every chunk of an interleaved pipeline
has separate buffers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rao.planning.parameters import Parameter, chunk_parameters
from nemo_rao.planning.setting import Setting

# megatron-core's defaults with overlapped gradient reduction.
_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000
ADAM_BYTES = 8  # two moments in fp32


@dataclass(frozen=True)
class States:
    """Memory and parameters of a rank.

    Attributes:
        weights: bytes of weights, frozen ones included.
        gradients: bytes of the gradients of trained parameters.
        optimizer: bytes of Adam's moments and, with bf16 weights, of the fp32 copies, on the data-parallel rank with
            the largest shard.
        trained: number of trained parameters.
        parameters: number of all parameters.
        buffer: elements that are reduced over the ranks with the same weights, padding included.
        expert_buffer: the same for experts that are split over ranks.
    """

    weights: int
    gradients: int
    optimizer: int
    trained: int
    parameters: int
    buffer: int
    expert_buffer: int


def stage_states(setting: Setting, stage: int) -> States:
    """Return what a rank of this stage holds throughout training."""
    return _states(
        tuple(tuple(chunk_parameters(setting, stage, chunk)) for chunk in range(setting.virtual)),
        _Ranks(setting.tensor, setting.shards, setting.expert * setting.of_expert, setting.expert_shards),
        setting.param_bytes,
        setting.grad_bytes,
        setting.use_distributed_optimizer,
        bucket_elements(setting, stage),
    )


def bucket_elements(setting: Setting, stage: int) -> int | None:
    """Return the elements at which a bucket is full; ``None``: one bucket, as on all stages but the first.

    In an interleaved pipeline, ``None`` on all chunks but the first stage's first.
    """
    if not setting.overlap_grad_reduce or stage > 0:
        return None
    return max(_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_RANK * setting.data)


@dataclass(frozen=True)
class _Ranks:
    """How a stage's ranks, in Megatron's order, share weights and experts.

    Attributes:
        tensor, shards: consecutive ranks that split a layer, and copies of it.
        of_experts, expert_shards: consecutive ranks that split the experts, and copies of them.
    """

    tensor: int
    shards: int
    of_experts: int
    expert_shards: int


@functools.lru_cache(maxsize=512)
def _states(
    chunks: tuple[tuple[Parameter, ...], ...],
    ranks: _Ranks,
    param_bytes: int,
    grad_bytes: int,
    distributed: bool,
    bucket_size: int | None,
) -> States:
    parameters = [parameter for chunk in chunks for parameter in chunk]
    frozen = sum(parameter.size for parameter in parameters if not parameter.trained)
    trained = sum(parameter.size for parameter in parameters if parameter.trained)
    # By kind, dense and expert: elements of the buffers, and elements that each shard updates.
    sizes, owned = [0, 0], [[0] * ranks.shards, [0] * ranks.expert_shards]
    for number, chunk in enumerate(chunks):
        for expert, shards in ((False, ranks.shards), (True, ranks.expert_shards)):
            buckets = lay_out(
                [parameter for parameter in chunk if parameter.expert == expert],
                data=shards,
                distributed=distributed,
                bucket_size=bucket_size if number == 0 else None,
            )
            sizes[expert] += buckets[-1].end if buckets else 0
            owned[expert] = [sum(pair) for pair in zip(owned[expert], owned_elements(buckets, shards), strict=True)]
    most = trained
    if distributed:
        positions = range(ranks.tensor * ranks.shards)
        most = max(
            owned[False][position // ranks.tensor] + owned[True][position // ranks.of_experts] for position in positions
        )
    return States(
        weights=(frozen + sum(sizes)) * param_bytes,
        gradients=sum(sizes) * grad_bytes,
        optimizer=most * (ADAM_BYTES + (4 if param_bytes < 4 else 0)),
        trained=trained,
        parameters=frozen + trained,
        buffer=sizes[False],
        expert_buffer=sizes[True],
    )


@dataclass(frozen=True)
class Bucket:
    """Elements [start, end) of a buffer, padding at the end included, and the parameters in them."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]


def lay_out(parameters: Sequence[Parameter], *, data: int, distributed: bool, bucket_size: int | None) -> list[Bucket]:
    """Compute Megatron's layout of the trained parameters (megatron-core's ``_ParamAndGradBuffer``)."""
    buckets: list[Bucket] = []
    ranges: list[tuple[int, int]] = []
    start = at = 0

    def close() -> None:
        nonlocal start, at
        end = _up(at, math.lcm(data, 128)) if distributed else at
        buckets.append(Bucket(start, end, tuple(ranges)))
        ranges.clear()
        start = at = end

    for parameter in reversed([one for one in parameters if one.trained]):
        alone = parameter.shared_embedding and distributed
        begins = _up(at, 64) if distributed else at
        if alone and ranges:
            at = begins
            close()
            begins = at
        at = begins + parameter.size
        ranges.append((begins, at))
        if alone or (bucket_size is not None and at - start >= bucket_size):
            close()
    if ranges:
        close()
    return buckets


def owned_elements(buckets: Sequence[Bucket], data: int) -> list[int]:
    """Return the parameter elements, without padding, that each data-parallel rank updates."""
    owned = [0] * data
    for bucket in buckets:
        share = (bucket.end - bucket.start) // data
        for begins, ends in bucket.ranges:
            for rank in range((begins - bucket.start) // share, -(-(ends - bucket.start) // share)):
                low = bucket.start + rank * share
                owned[rank] += max(0, min(ends, low + share) - max(begins, low))
    return owned


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
