"""What samples the responses of a rollout: an interface, and the training model itself behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nemo_rao.ops.sampling import uniforms
from nemo_rao.rollout.decode import Request, Sampled, Sampling, sample


@dataclass(frozen=True)
class Wanted:
    """K responses to the prompt of one slot.

    Attributes:
        prompt: ``[prompt tokens]`` int32, the generation prompt last.
        rollout, slot: where they belong; with the number of a response, all that its draws depend on but the seed.
        num_responses: K.
    """

    prompt: np.ndarray
    rollout: int
    slot: int
    num_responses: int


class Sampler(Protocol):
    """Samples with the weights that the training model has."""

    def sample(self, chunks: Sequence[Any], wanted: Sequence[Wanted]) -> list[list[Sampled]]:
        """The responses to each prompt, in order, the same on every rank of the model-parallel group.

        A collective of all ranks.

        Args:
            chunks: this rank's model chunks, as Megatron's schedules take them.
            wanted: of this data-parallel rank.

        Raises:
            RankFailure: it cannot go on.
        """

    def close(self) -> None:
        """Give back what is held."""


@dataclass(frozen=True)
class MegatronSampler:
    """The training model, in place; see :func:`nemo_rao.rollout.decode.sample`.

    Attributes:
        seed: of the draws.
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
