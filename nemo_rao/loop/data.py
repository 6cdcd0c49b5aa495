"""A run's data in micro-batches: in an order that is independent of parallelism and resumes from the step number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from megatron.core import parallel_state

from nemo_rao.batch import MicroBatch
from nemo_rao.config.precision_checks import sequence_multiple
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.collate import collate
from nemo_rao.data.order import every_sample_once, global_batch, rank_micro_batches
from nemo_rao.data.prefetch import NotAhead, Prefetcher
from nemo_rao.data.store import PreferenceData
from nemo_rao.mcore.context_parallel import part_of_rank, size_and_rank
from nemo_rao.mcore.forward import made_ahead
from nemo_rao.rollout.samples import RolloutData


class AlignmentData:
    """A data set with its reference log-probs, split into micro-batches.

    Attributes:
        reference: ``[responses, 2]`` float32 sums, set by the reference pass; ``None`` for objectives without one.
        mismatched: the same prompts, each with a response to another one; ``None`` if not needed.

    Args:
        pad_token_id, pad_multiple, packed, shared_prompts: see :func:`nemo_rao.data.collate.collate`.
    """

    def __init__(
        self,
        data: PreferenceData | RolloutData,
        *,
        pad_token_id: int,
        pad_multiple: int,
        packed: bool = False,
        shared_prompts: bool = False,
        mismatched: AlignmentData | None = None,
    ) -> None:
        self.data = data
        self.mismatched = mismatched
        self.reference: np.ndarray | None = None
        self._pad_token_id = pad_token_id
        self._pad_multiple = pad_multiple
        self._packed = packed
        self._shared_prompts = shared_prompts

    def micro_batch(self, prompts: Sequence[int]) -> MicroBatch:
        """Collate these prompts with all their responses, with the tokens of this context-parallel rank."""
        batch = collate(
            [self.data[i] for i in prompts],
            [self.data.response_offset(i) for i in prompts],
            pad_token_id=self._pad_token_id,
            pad_multiple=self._pad_multiple,
            packed=self._packed,
            shared_prompts=self._shared_prompts,
            reference=self.reference,
        )
        return part_of_rank(batch, *size_and_rank())

    def micro_batches_of_rank(self, micro_batch_size: int) -> list[list[int]]:
        """Return the prompt indices of this data-parallel rank's micro-batches in a pass over the whole data set."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return every_sample_once(len(self.data), micro_batch_size, rank, size)

    def responses_of_prompts(self) -> list[range]:
        """Return the response indices of each prompt."""
        offsets = [self.data.response_offset(i) for i in range(len(self.data))] + [self.data.num_responses]
        return [range(start, stop) for start, stop in itertools.pairwise(offsets)]


class TrainingData:
    """Training data of a run, and the prompts of each step.

    Args:
        train: tokenized data.
        micro_batch_size, global_batch_size: number of prompts.
        seed: seed of the order; ``None`` keeps the file's order in every epoch.
    """

    def __init__(
        self, train: AlignmentData, *, micro_batch_size: int, global_batch_size: int, seed: int | None
    ) -> None:
        self.train = train
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self._seed = seed

    def prompts_of_step(self, step: int) -> np.ndarray:
        """Return the ``[global_batch_size]`` int64 prompt indices of an optimizer step; steps count from 0."""
        return global_batch(
            step, num_samples=len(self.train.data), global_batch_size=self.global_batch_size, seed=self._seed
        )

    def micro_batches_of_step(self, step: int) -> list[list[int]]:
        """Return the prompt indices of this rank's micro-batches in an optimizer step, counted from 0."""
        prompts = self.prompts_of_step(step)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return rank_micro_batches(prompts, self.micro_batch_size, rank, size)

    def stream(self, step: int) -> Prefetcher[MicroBatch] | NotAhead[MicroBatch]:
        """Return :meth:`micro_batches_from` as a context manager that ends it."""
        return made_ahead(self.micro_batches_from(step))

    def micro_batches_from(self, step: int) -> Iterator[MicroBatch]:
        """Yield this data-parallel rank's micro-batches from a step on, endlessly."""
        for at in itertools.count(step):
            for prompts in self.micro_batches_of_step(at):
                yield self.train.micro_batch(prompts)


def batch_layout(config: RunConfig) -> dict[str, Any]:
    """Return the layout of micro-batches, as arguments of :func:`nemo_rao.data.collate.collate`."""
    return {
        "pad_multiple": pad_multiple(config),
        "packed": config.data.packing,
        "shared_prompts": config.data.prefix_sharing,
    }


def pad_multiple(config: RunConfig) -> int:
    """Return the multiple that tokens are padded to, as set in the recipe and as split sequences and FP8 require."""
    return math.lcm(config.data.pad_to_multiple_of, sequence_multiple(config))
