"""The order of a run that samples: the prompts of each rollout, and the slots of the rollout for each step."""

from __future__ import annotations

import numpy as np

from nemo_rao.batch import MicroBatch
from nemo_rao.data.order import global_batch
from nemo_rao.data.prefetch import NotAhead
from nemo_rao.loop.data import AlignmentData, TrainingData
from nemo_rao.rollout.samples import RolloutData


class OnlineData(TrainingData):
    """The order in which a run uses its prompts. A global batch consists of slots of the current rollout.

    Args:
        train: data that wraps a :class:`nemo_rao.rollout.samples.RolloutData`, which holds the current rollout.
        micro_batch_size, global_batch_size: number of prompts.
        seed: seed of the order; ``None`` keeps the file's order.
        num_prompts: number of prompts of the run.
        mini_batches: global batches per rollout.
        epochs: passes over a rollout.
    """

    def __init__(
        self,
        train: AlignmentData,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int | None,
        num_prompts: int,
        mini_batches: int,
        epochs: int,
    ) -> None:
        super().__init__(train, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, seed=seed)
        self._num_prompts = num_prompts
        self._mini_batches = mini_batches
        self._epochs = epochs

    @property
    def rollout_data(self) -> RolloutData:
        """The data that holds the current rollout."""
        data = self.train.data
        assert isinstance(data, RolloutData), "constructed with one"
        return data

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self._mini_batches * self._epochs

    def rollout_of(self, step: int) -> tuple[int, bool]:
        """Return (the rollout's number, whether the step is its first) for a step; both count from 0."""
        number, within = divmod(step, self.steps_per_rollout)
        return number, within == 0

    def prompts_of_rollout(self, number: int) -> np.ndarray:
        """Return ``[S]`` int64, the prompt of each slot."""
        first = number * self._mini_batches
        parts = [
            global_batch(step, num_samples=self._num_prompts, global_batch_size=self.global_batch_size, seed=self._seed)
            for step in range(first, first + self._mini_batches)
        ]
        return np.concatenate(parts)

    def prompts_of_step(self, step: int) -> np.ndarray:
        """Return ``[global_batch_size]`` int64 slots; reshuffled from the second pass over a rollout on."""
        number, _ = self.rollout_of(step)
        epoch, batch = divmod(step % self.steps_per_rollout, self._mini_batches)
        slots = np.arange(self._mini_batches * self.global_batch_size)
        if epoch:
            # RandomState: its stream is frozen, see nemo_rao.data.order.
            seeds = np.random.SeedSequence([0 if self._seed is None else self._seed, number, epoch])
            slots = np.random.RandomState(np.random.MT19937(seeds)).permutation(slots)
        return slots[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]

    def stream(self, step: int) -> NotAhead[MicroBatch]:
        """Do not prefetch: the next samples do not exist yet."""
        return NotAhead(self.micro_batches_from(step))
