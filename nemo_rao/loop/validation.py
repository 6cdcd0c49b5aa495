"""The policy on data that it does not train on."""

from __future__ import annotations

from collections.abc import Collection

from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.mcore.evaluate import evaluate
from nemo_rao.mcore.mismatched import mean_log_ratio


class Validation(Hook):
    """Evaluates the policy on every validation prompt: before the first step, at intervals, and at the end.

    The means are reported as ``val/<metric>``.

    Args:
        data: the validation data.
        intervals: optimizer steps between evaluations; where one of several ends, there is one.
        micro_batch_size: prompts.
    """

    def __init__(self, data: AlignmentData, *, intervals: Collection[int], micro_batch_size: int) -> None:
        self._data = data
        self._intervals = intervals
        self._micro_batch_size = micro_batch_size
        self._last_step = -1

    def start(self, session: Session) -> None:
        if session.step == 0:
            self._evaluate(session)

    def after_step(self, session: Session) -> None:
        if session.step == session.max_steps or any(session.step % interval == 0 for interval in self._intervals):
            self._evaluate(session)

    def _evaluate(self, session: Session) -> None:
        if session.step == self._last_step:
            return
        self._last_step = session.step
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
            mismatched_log_ratio=log_ratio,
        )
        log(session, {f"val/{name}": value for name, value in values.items()})
