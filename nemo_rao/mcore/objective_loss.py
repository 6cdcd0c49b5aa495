"""The loss function of Megatron's schedules: an objective over the last pipeline stage's output of a micro-batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.first_step import LogRatios
from nemo_rao.mcore.loss import for_schedule, micro_batch_loss
from nemo_rao.objectives.base import Objective


class ObjectiveLoss:
    """An objective with its keys, its inputs per step, and the statistics of the step's micro-batches.

    One object serves all model chunks of a rank.

    Args:
        objective: an objective of :mod:`nemo_rao.objectives.registry`.
        config: the objective's keys, with values that depend on the data resolved.
        vocab_size: V without padding.

    Attributes:
        needs: needs of the objective with these keys.
        kl_estimate: ``[]`` float32, nats, of the current global batch; set before each step if
            ``needs.kl_estimate``.
        log_ratios: collects the log-ratios of the first step (:mod:`nemo_rao.loop.first_step`).
        statistics: name -> ``[2]`` (sum, count) of each micro-batch since they were last taken; filled on the last
            pipeline stage.
    """

    def __init__(self, objective: Objective, config: Any, *, vocab_size: int) -> None:
        self.objective = objective
        self.config = config
        self.vocab_size = vocab_size
        self.needs = objective.needs_of(config)
        self.kl_estimate: Tensor | None = None
        self.log_ratios: LogRatios | None = None
        self.statistics: list[dict[str, Tensor]] = []

    def __call__(self, output: ModelOutput, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return (sum over prompts, number of prompts, statistics) of a micro-batch; see :mod:`nemo_rao.mcore.loss`."""
        loss_sum, num_prompts, statistics = for_schedule(
            micro_batch_loss(
                output,
                batch,
                self.objective,
                self.config,
                vocab_size=self.vocab_size,
                kl_estimate=self.kl_estimate,
                observe=None if self.log_ratios is None else self.log_ratios.add,
            )
        )
        self.statistics.append(statistics)
        return loss_sum, num_prompts, statistics

    def take_statistics(self) -> list[dict[str, Tensor]]:
        """Return the statistics collected so far, and clear them."""
        taken, self.statistics = self.statistics, []
        return taken
