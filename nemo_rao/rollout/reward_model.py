"""A trained reward model beside the policy, on the same ranks: it reads the sampled tokens themselves.

Its weights wait in host memory, split as the policy's are, and are on the device for the pass alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.errors import RankFailure
from nemo_rao.rollout.passes import rollout_reports
from nemo_rao.rollout.reference import on_host
from nemo_rao.rollout.samples import Rollout


class RewardModel:
    """Scores rollouts.

    Args:
        name: of the scorer.
        chunks: this rank's, with their weights, and on the last pipeline stage with a score head.
    """

    def __init__(self, name: str, chunks: Sequence[Any]) -> None:
        self.name = name
        self._chunks = chunks
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._weights = [(parameter, on_host(parameter)) for parameter in parameters]
        self._devices = {parameter.device for parameter in parameters}
        self._move_to_host()

    def scores(
        self, rollout: Rollout, make_micro_batch: Callable[[Sequence[int]], MicroBatch], *, micro_batch_size: int
    ) -> np.ndarray:
        """``[S, K]`` float64, the head's number (of several, the first) of each response. A collective over all ranks.

        Args:
            make_micro_batch: slots of the rollout -> micro-batch.
            micro_batch_size: slots.

        Raises:
            RankFailure: a score is not finite.
        """

        def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
            assert output.scores is not None, "the model has a score head"
            return {"ids": batch.response_ids, "scores": output.scores[:, 0]}

        with self._on_device():
            reports = rollout_reports(
                self._chunks,
                len(rollout.prompts),
                make_micro_batch,
                micro_batch_size=micro_batch_size,
                report=report,
            )
        scores = np.full(rollout.lengths.size, np.nan)
        for one in reports:
            scores[one["ids"]] = one["scores"]
        if not np.isfinite(scores).all():
            raise RankFailure(f"online.reward: {self.name} gave a score that is not finite")
        return scores.reshape(rollout.lengths.shape)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        (device,) = self._devices or {torch.device("cpu")}
        for parameter, kept in self._weights:
            parameter.data = kept.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._move_to_host()

    def _move_to_host(self) -> None:
        for parameter, kept in self._weights:
            parameter.data = kept
