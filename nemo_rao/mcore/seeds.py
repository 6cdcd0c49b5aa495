"""Random numbers of the initial weights, and of a step as a function of seed, step and rank: a resumed run draws the
same numbers as an uninterrupted one.

Megatron keeps several streams on each rank, which ranks must share as follows:

    default            dropout of activations that are replicated over tensor-parallel ranks: the same on these, but
                       different on each data- and context-parallel rank, which hold other tokens, and on each pipeline
                       stage, which holds other layers
    tensor-parallel    dropout of what these split (attention heads; the sequence, with sequence parallelism): different
                       on each of them
    expert-parallel    different on each rank that holds other experts

The virtual stages of a rank use one stream in sequence, like its layers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def seed_weights(seed: int) -> None:
    """Seed this rank's generators for the initial weights, as Megatron's training does.

    Args:
        seed: seed of the run.
    """
    of_stage = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(of_stage)
    model_parallel_cuda_manual_seed(of_stage)


def seed_step(seed: int, step: int) -> None:
    """Seed this rank's generators for an optimizer step.

    Args:
        seed: seed of the run.
        step: optimizer steps done.
    """
    # Without the tensor-parallel rank, which Megatron adds for the streams that are not shared.
    rank = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    drawn = derived_seed(seed, step, *rank)
    # torch.manual_seed() seeds devices of other vendors too: for each that is not initialized, it formats the stack of
    # its caller and keeps that with the seed, at every step, until the device is.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(drawn)
    model_parallel_cuda_manual_seed(drawn)


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore this rank's random state after the block."""
    tracker = get_cuda_rng_tracker()
    streams = tracker.get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            tracker.set_states(streams)


def derived_seed(*values: int | str) -> int:
    """Derive a 31-bit seed from these values.

    A hash, not a sum of multiples: Megatron derives further seeds by addition. 31 bits: a CPU generator uses at most
    32.
    """
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:4], "big") >> 1
