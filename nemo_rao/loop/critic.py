"""A critic that is a separate model: it computes values for each rollout and takes a step before each of the policy's.

Both steps use the same micro-batches. A checkpoint counts as complete only if it contains both, so a run never resumes
with a critic and a policy of different steps.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from nemo_rao.checkpoint.layout import CRITIC
from nemo_rao.errors import RankFailure
from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.finite import not_finite
from nemo_rao.loop.prepared import CriticTask
from nemo_rao.loop.schedule import learning_rate
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.mcore.loss import LOSS, means, reduce_statistics
from nemo_rao.mcore.objective_loss import ObjectiveLoss
from nemo_rao.mcore.trained_model import TrainedModel
from nemo_rao.rollout.log_probs import rollout_values
from nemo_rao.rollout.samples import Rollout


class TrainCritic(Hook):
    """Trains the critic. Must come after :class:`nemo_rao.loop.rollouts.MakeRollouts`, which calls :meth:`values`.

    Logged at each step, with the metrics of the objective that trains it
    (:func:`nemo_rao.objectives.ppo.ppo_value_loss`):

        ppo/critic_grad_norm    gradient norm before clipping; absent if fp16 skipped the step
        ppo/critic_lr           learning rate
        seconds/critic          time of its step, which ``seconds/update`` does not include

    Args:
        task: builds the critic, on every rank.
    """

    def __init__(self, task: CriticTask) -> None:
        self._task = task
        self._metrics: dict[str, float] = {}

    def start(self, session: Session) -> None:
        resume_from = self._task.resume_from
        self._model: TrainedModel = self._task.build(resume_from is not None)
        if resume_from is not None:
            self._model.load(resume_from)
        critic = session.loss.objective.critic
        assert critic is not None, "the objective defines a critic"
        self._loss = ObjectiveLoss(critic, session.loss.config, vocab_size=session.loss.vocab_size)

    def values(self, rollout: Rollout, data: AlignmentData, micro_batch_size: int) -> np.ndarray:
        """Compute the value of each token of the rollout that ``data`` holds: float32, shaped like ``rollout.tokens``.
        A collective over all ranks.

        Args:
            micro_batch_size: number of slots.
        """
        with self._model.on_device():
            return rollout_values(self._model.chunks, rollout, data.micro_batch, micro_batch_size=micro_batch_size)

    def before_step(self, session: Session) -> None:
        data, step, task = session.data, session.step, self._task
        started = time.perf_counter()
        rate = learning_rate(task.schedule, step, highest=task.rate, max_steps=session.max_steps)
        norm = self._model.step(
            data.micro_batches_of_step(step), make_micro_batch=data.train.micro_batch, loss=self._loss, rate=rate
        )
        of_objective = means(reduce_statistics(self._loss.take_statistics()))
        self._metrics = {
            # Without the loss, which is logged for the policy only.
            **{name: value for name, value in of_objective.items() if name != LOSS},
            **({} if norm is None else {"ppo/critic_grad_norm": norm}),
            "ppo/critic_lr": rate,
            "seconds/critic": time.perf_counter() - started,
        }
        if norm is not None and not math.isfinite(norm):
            rows = (data.train.data[index] for index in data.prompts_of_step(step))
            raise RankFailure(not_finite("gradient norm of the critic", norm, step + 1, rows))

    def after_step(self, session: Session) -> None:
        log(session, self._metrics)

    def save(self, session: Session, folder: Path) -> None:
        self._model.save(folder / CRITIC)
