"""A trained reward model on the policy's ranks that scores the sampled tokens.

With GPUs, its weights are in host memory, sharded as the policy's, and on the device only during the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.errors import RankFailure
from nemo_rao.mcore.host_memory import HostMemory, on_gpu
from nemo_rao.rollout.passes import rollout_reports
from nemo_rao.rollout.samples import Rollout


class RewardModel:
    """Scores rollouts.

    Args:
        name: name of the scorer.
        chunks: this rank's model chunks with their weights, and a score head on the last pipeline stage.
    """

    def __init__(self, name: str, chunks: Sequence[Any]) -> None:
        self.name = name
        self._chunks = chunks
        parameters = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
        self._weights = HostMemory(lambda: on_gpu(parameters))
        self._weights.send_away()

    def scores(
        self, rollout: Rollout, make_micro_batch: Callable[[Sequence[int]], MicroBatch], *, micro_batch_size: int
    ) -> np.ndarray:
        """Compute ``[S, K]`` float64 scores, the first if the head has several. A collective over all ranks.

        Args:
            make_micro_batch: slots of the rollout -> micro-batch.
            micro_batch_size: slots.

        Raises:
            RankFailure: a score is not finite.
        """

        def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
            assert output.scores is not None, "the model has a score head"
            return {"ids": batch.response_ids, "scores": output.scores[:, 0]}

        with self._weights.on_device(changed=False):
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
