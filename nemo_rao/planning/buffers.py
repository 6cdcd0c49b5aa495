"""Megatron's buffers of weights and gradients, and each data-parallel rank's share of the optimizer's state: exact.

Megatron lays trained parameters out in the reverse of their order, in buckets. With the distributed optimizer every
parameter starts at a multiple of 64 elements and every bucket ends at a multiple of lcm(DP, 128), weights live in a
buffer of the same layout, and rank r owns the r-th of DP equal parts of each bucket (ZeRO stage 1, Rajbhandari et al.
2020). The padding is in the buffers, but not in the optimizer's state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rao.planning.parameters import Parameter, stage_parameters
from nemo_rao.planning.setting import Setting

_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000  # megatron-core's, where gradients overlap
ADAM_BYTES = 8  # two moments in fp32


@dataclass(frozen=True)
class States:
    """Bytes of a rank.

    Attributes:
        weights: frozen ones included.
        gradients: of trained parameters.
        optimizer: Adam's moments and, beside bf16 weights, their fp32 copies; of the data-parallel rank with the
            largest share.
        trained: parameters that are trained, elements.
        parameters: all of them, elements.
        buffer: elements that are reduced over the data-parallel ranks, padding included.
    """

    weights: int
    gradients: int
    optimizer: int
    trained: int
    parameters: int
    buffer: int


def stage_states(setting: Setting, stage: int) -> States:
    """What a rank of this stage holds throughout training."""
    return _states(
        tuple(stage_parameters(setting, stage)),
        setting.data,
        setting.param_bytes,
        setting.grad_bytes,
        setting.use_distributed_optimizer,
        bucket_elements(setting, stage),
    )


def bucket_elements(setting: Setting, stage: int) -> int | None:
    """Elements from which on a bucket is full; ``None``: one bucket, as on all stages but the first."""
    if not setting.overlap_grad_reduce or stage > 0:
        return None
    return max(_BUCKET_ELEMENTS, _BUCKET_ELEMENTS_PER_RANK * setting.data)


@functools.lru_cache(maxsize=512)
def _states(
    parameters: tuple[Parameter, ...],
    data: int,
    param_bytes: int,
    grad_bytes: int,
    distributed: bool,
    bucket_size: int | None,
) -> States:
    frozen = sum(parameter.size for parameter in parameters if not parameter.trained)
    trained = sum(parameter.size for parameter in parameters if parameter.trained)
    buckets = lay_out(parameters, data=data, distributed=distributed, bucket_size=bucket_size)
    buffer = buckets[-1].end if buckets else 0
    owned = max(owned_elements(buckets, data)) if distributed else trained
    each = ADAM_BYTES + (4 if param_bytes < 4 else 0)
    return States(
        weights=(frozen + buffer) * param_bytes,
        gradients=buffer * grad_bytes,
        optimizer=owned * each,
        trained=trained,
        parameters=frozen + trained,
        buffer=buffer,
    )


@dataclass(frozen=True)
class Bucket:
    """Elements [start, end) of a buffer, padding at the end included, and the parameters in them."""

    start: int
    end: int
    places: tuple[tuple[int, int], ...]


def lay_out(parameters: Sequence[Parameter], *, data: int, distributed: bool, bucket_size: int | None) -> list[Bucket]:
    """Megatron's layout of the trained parameters (megatron-core's ``_ParamAndGradBuffer``)."""
    buckets: list[Bucket] = []
    places: list[tuple[int, int]] = []
    start = at = 0

    def close() -> None:
        nonlocal start, at
        end = _up(at, math.lcm(data, 128)) if distributed else at
        buckets.append(Bucket(start, end, tuple(places)))
        places.clear()
        start = at = end

    for parameter in reversed([one for one in parameters if one.trained]):
        alone = parameter.shared_embedding and distributed
        begins = _up(at, 64) if distributed else at
        if alone and places:
            at = begins
            close()
            begins = at
        at = begins + parameter.size
        places.append((begins, at))
        if alone or (bucket_size is not None and at - start >= bucket_size):
            close()
    if places:
        close()
    return buckets


def owned_elements(buckets: Sequence[Bucket], data: int) -> list[int]:
    """Parameters' elements, padding left out, that each data-parallel rank updates."""
    owned = [0] * data
    for bucket in buckets:
        share = (bucket.end - bucket.start) // data
        for begins, ends in bucket.places:
            for rank in range((begins - bucket.start) // share, -(-(ends - bucket.start) // share)):
                low = bucket.start + rank * share
                owned[rank] += max(0, min(ends, low + share) - max(begins, low))
    return owned


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
