"""Assignment of samples to steps, ranks and micro-batches: a function of the seed and the step number alone.

No state is kept between steps, so a resumed run needs only the number of its next step, and may continue with a
different number of ranks or micro-batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from nemo_rao.errors import UserError


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Number of whole global batches in an epoch. Samples that do not fill the last one are dropped in that epoch;
    since every epoch is shuffled anew, different ones are dropped each time.

    Raises:
        UserError: the data does not fill one global batch.
    """
    if global_batch_size < 1:
        raise UserError(f"global_batch_size is {global_batch_size}. It must be at least 1 prompt.")
    if global_batch_size > num_samples:
        raise UserError(
            f"global_batch_size is {global_batch_size} prompts, but the data has only {num_samples}. "
            "Lower it or add data."
        )
    return num_samples // global_batch_size


def global_batch(step: int, *, num_samples: int, global_batch_size: int, seed: int | None) -> np.ndarray:
    """``[global_batch_size]`` int64: sample indices of step ``step`` (counted from 0 over all epochs).

    Without a seed, every epoch keeps the order of the data.
    """
    if seed is not None and seed < 0:
        raise UserError(f"seed is {seed}. It must be at least 0.")
    assert step >= 0, step
    epoch, batch = divmod(step, steps_per_epoch(num_samples, global_batch_size))
    start = batch * global_batch_size
    if seed is None:
        return np.arange(start, start + global_batch_size)
    return _epoch_order(seed, epoch, num_samples)[start : start + global_batch_size].copy()


def rank_micro_batches(
    indices: Sequence[int] | np.ndarray, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[list[int]]:
    """The micro-batches of one data-parallel rank, each a list of ``micro_batch_size`` sample indices.

    The ranks take consecutive pieces of ``indices``, so their union is the global batch for every split.

    Raises:
        UserError: the global batch cannot be split evenly.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    if micro_batch_size < 1 or len(indices) % (micro_batch_size * dp_size):
        raise UserError(
            f"global_batch_size {len(indices)} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"data-parallel size {dp_size}. Change one of them."
        )
    share = len(indices) // dp_size
    mine = [int(index) for index in indices[dp_rank * share : (dp_rank + 1) * share]]
    return [mine[start : start + micro_batch_size] for start in range(0, share, micro_batch_size)]


def every_sample_once(num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[list[int]]:
    """One rank's micro-batches for a pass over all data in file order (reference log-probs, validation).

    Over all ranks, each sample appears exactly once. The last micro-batch may therefore be smaller, and ranks may
    differ by one micro-batch (with more ranks than micro-batches, some have none).
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    starts = range(dp_rank * micro_batch_size, num_samples, dp_size * micro_batch_size)
    return [list(range(start, min(start + micro_batch_size, num_samples))) for start in starts]


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """``[num_samples]`` permutation of the epoch. ``RandomState`` because its stream is frozen: numpy's newer
    generators may change theirs between versions, and a run may be resumed in another container."""
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(num_samples).astype(np.int64)
    order.setflags(write=False)
    return order
