"""Validation of the policy on held-out data."""

from __future__ import annotations

import abc
from collections.abc import Collection

from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.mcore.evaluate import evaluate
from nemo_rao.mcore.mismatched import mean_log_ratio


class EvaluatesAtIntervals(Hook, abc.ABC):
    """Calls :meth:`evaluate` at intervals and at the end. Subclasses call :meth:`once` before the first step.

    Args:
        intervals: optimizer steps between evaluations; with several intervals, at multiples of any of them.
    """

    def __init__(self, intervals: Collection[int]) -> None:
        self._intervals = intervals
        self._last_step = -1

    def after_step(self, session: Session) -> None:
        if session.step == session.max_steps or any(session.step % interval == 0 for interval in self._intervals):
            self.once(session)

    def once(self, session: Session) -> None:
        """Evaluate, unless already done at this step."""
        if session.step != self._last_step:
            self._last_step = session.step
            self.evaluate(session)

    @abc.abstractmethod
    def evaluate(self, session: Session) -> None:
        """Evaluate the policy and report the numbers. A collective over all ranks."""


class Validation(EvaluatesAtIntervals):
    """Evaluates the policy on every validation prompt: before the first step, at intervals, and at the end.

    The means are reported as ``val/<metric>``.

    Args:
        data: the validation data.
        intervals: see :class:`EvaluatesAtIntervals`.
        micro_batch_size: number of prompts.
    """

    def __init__(self, data: AlignmentData, *, intervals: Collection[int], micro_batch_size: int) -> None:
        super().__init__(intervals)
        self._data = data
        self._micro_batch_size = micro_batch_size

    def start(self, session: Session) -> None:
        if session.step == 0:
            self.once(session)

    def evaluate(self, session: Session) -> None:
        micro_batches, loss = self._data.micro_batches_of_rank(self._micro_batch_size), session.loss
        log_ratio = None
        if self._data.mismatched is not None:
            log_ratio = mean_log_ratio(
                session.chunks,
                micro_batches,
                make_micro_batch=self._data.mismatched.micro_batch,
                vocab_size=loss.vocab_size,
            )
        values = evaluate(
            session.chunks,
            micro_batches,
            make_micro_batch=self._data.micro_batch,
            objective=loss.objective,
            objective_config=loss.config,
            vocab_size=loss.vocab_size,
            kl_estimate=log_ratio,
        )
        log(session, {f"val/{name}": value for name, value in values.items()})
