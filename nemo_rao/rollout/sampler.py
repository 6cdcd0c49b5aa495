"""Samplers of rollouts: the interface, and the implementation that samples from the training model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nemo_rao.ops.sampling import uniforms
from nemo_rao.rollout.decode import Request, Sampled, Sampling, sample


@dataclass(frozen=True)
class Wanted:
    """Request for K responses to the prompt of one slot.

    Attributes:
        prompt: ``[prompt tokens]`` int32, the generation prompt last.
        rollout, slot: index of the rollout and slot; draws depend only on these, the response index and the seed.
        num_responses: K.
    """

    prompt: np.ndarray
    rollout: int
    slot: int
    num_responses: int


class Sampler(Protocol):
    """Samples with the current weights of the training model."""

    def sample(self, chunks: Sequence[Any], wanted: Sequence[Wanted]) -> list[list[Sampled]]:
        """Sample the responses to each prompt, in order, identical on every rank of the model-parallel group.

        A collective over all ranks.

        Args:
            chunks: this rank's model chunks, as Megatron's schedules take them.
            wanted: requests of this data-parallel rank.

        Raises:
            RankFailure: the sampler has failed.
        """

    def close(self) -> None:
        """Release all resources."""


@dataclass(frozen=True)
class MegatronSampler:
    """Samples from the training model in place; see :func:`nemo_rao.rollout.decode.sample`.

    Attributes:
        seed: sampling seed.
    """

    max_new_tokens: int
    end_tokens: Sequence[int]
    sampling: Sampling
    rows_at_once: int
    vocab_size: int
    seed: int

    def sample(self, chunks: Sequence[Any], wanted: Sequence[Wanted]) -> list[list[Sampled]]:
        return sample(
            chunks,
            [Request(one.prompt, self._draws(one)) for one in wanted],
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.end_tokens,
            sampling=self.sampling,
            rows_at_once=self.rows_at_once,
            vocab_size=self.vocab_size,
        )

    def close(self) -> None:
        pass

    def _draws(self, one: Wanted) -> np.ndarray:
        streams = [(one.rollout, one.slot, k) for k in range(one.num_responses)]
        return np.stack([uniforms(self.seed, stream, self.max_new_tokens) for stream in streams])
