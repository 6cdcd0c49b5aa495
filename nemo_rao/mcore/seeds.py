"""Random numbers of the initial weights, and of a step as a function of seed, step and rank: a resumed run draws what
an undisturbed one would.

Megatron keeps several streams on each rank. What each must share, and with whom:

    default            dropout of activations that tensor-parallel ranks hold alike: the same on them, another on each
                       data- and context-parallel rank, which hold other tokens, and on each pipeline stage, which
                       holds other layers
    tensor-parallel    dropout of what they split (attention heads; the sequence, with sequence parallelism): another
                       on each of them
    expert-parallel    another on each rank that holds other experts

The virtual stages of a rank follow each other in one stream, as its layers do.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed


def seed_weights(seed: int) -> None:
    """Seed this rank's generators for the initial weights, as Megatron's own training does.

    Args:
        seed: of the run.
    """
    of_stage = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(of_stage)
    model_parallel_cuda_manual_seed(of_stage)


def seed_step(seed: int, step: int) -> None:
    """Seed this rank's generators for an optimizer step.

    Args:
        seed: of the run.
        step: optimizer steps done.
    """
    # Tensor-parallel ranks are left out: Megatron adds theirs to the streams that are not shared.
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
    """What is drawn inside the block changes nothing of what is drawn behind it, on this rank."""
    tracker = get_cuda_rng_tracker()
    streams = tracker.get_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            tracker.set_states(streams)


def derived_seed(*values: int | str) -> int:
    """A seed that these values decide, of 31 bits.

    A hash, not a sum of multiples: Megatron derives further seeds by adding to one. 31 bits: a CPU's generator reads no
    more than 32.
    """
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:4], "big") >> 1
