"""The order of a run that samples: the prompts of each rollout, and the slots of the rollout for each step."""

from __future__ import annotations

import numpy as np

from nemo_rao.batch import MicroBatch
from nemo_rao.data.order import global_batch
from nemo_rao.data.prefetch import NotAhead
from nemo_rao.loop.data import AlignmentData, TrainingData
from nemo_rao.rollout.samples import RolloutData


class OnlineData(TrainingData):
    """The order in which a run takes its prompts. A global batch consists of slots of the current rollout.

    Args:
        train: of a :class:`nemo_rao.rollout.samples.RolloutData`, which holds the current rollout.
        micro_batch_size, global_batch_size: prompts.
        seed: of the order; ``None`` keeps the file's order.
        num_prompts: of the whole run.
        mini_batches: global batches that fill a rollout.
        epochs: passes over it.
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
        """The current rollout, as data."""
        data = self.train.data
        assert isinstance(data, RolloutData), "made of one"
        return data

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on each rollout."""
        return self._mini_batches * self._epochs

    def rollout_of(self, step: int) -> tuple[int, bool]:
        """(number of the rollout that a step is taken on, whether it is the rollout's first step), both from 0."""
        number, within = divmod(step, self.steps_per_rollout)
        return number, within == 0

    def prompts_of_rollout(self, number: int) -> np.ndarray:
        """``[S]`` int64, the prompt of each slot."""
        first = number * self._mini_batches
        parts = [
            global_batch(step, num_samples=self._num_prompts, global_batch_size=self.global_batch_size, seed=self._seed)
            for step in range(first, first + self._mini_batches)
        ]
        return np.concatenate(parts)

    def prompts_of_step(self, step: int) -> np.ndarray:
        """``[global_batch_size]`` int64, slots; from the second pass over a rollout on, in a new order."""
        number, _ = self.rollout_of(step)
        epoch, batch = divmod(step % self.steps_per_rollout, self._mini_batches)
        slots = np.arange(self._mini_batches * self.global_batch_size)
        if epoch:
            # RandomState: its stream is frozen, see nemo_rao.data.order.
            seeds = np.random.SeedSequence([0 if self._seed is None else self._seed, number, epoch])
            slots = np.random.RandomState(np.random.MT19937(seeds)).permutation(slots)
        return slots[batch * self.global_batch_size : (batch + 1) * self.global_batch_size]

    def stream(self, step: int) -> NotAhead[MicroBatch]:
        """Nothing is made ahead: what comes next is not sampled yet."""
        return NotAhead(self.micro_batches_from(step))
