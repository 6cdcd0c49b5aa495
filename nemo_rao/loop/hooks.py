"""Small things around the steps: random numbers, scales, mismatched rows, progress."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rao.loop.session import Hook, Session
from nemo_rao.mcore.calibration import calibrate
from nemo_rao.mcore.mismatched import mean_log_ratio
from nemo_rao.mcore.seeds import seed_step
from nemo_rao.runtime.progress import Progress


class SeedEveryStep(Hook):
    """Random numbers of each step, see :mod:`nemo_rao.mcore.seeds`.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self, session: Session) -> None:
        seed_step(self._seed, session.step)


class CalibrateScales(Hook):
    """Before anything is computed, scales for delayed scaling (:mod:`nemo_rao.mcore.calibration`).

    A checkpoint carries them with the model: a resumed run has none to set.
    """

    def start(self, session: Session) -> None:
        if session.step == 0:
            data = session.data
            calibrate(session.chunks, data.micro_batches_of_step(0), make_micro_batch=data.train.micro_batch)


class RecordStart(Hook):
    """Lets rank 0 record what the run is, before the first step of this start and after all that may refuse it."""

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record

    def start(self, session: Session) -> None:
        if session.is_first_rank:
            self._record()


class MismatchedPass(Hook):
    """Before each step, the mean log-ratio of the step's prompts with responses to others, for the loss to use."""

    def before_step(self, session: Session) -> None:
        data, loss = session.data, session.loss
        assert data.train.mismatched is not None
        loss.kl_estimate = mean_log_ratio(
            session.chunks,
            data.micro_batches_of_step(session.step),
            make_micro_batch=data.train.mismatched.micro_batch,
            vocab_size=loss.vocab_size,
            log_ratios=loss.log_ratios,
        )


class ShowProgress(Hook):
    """Shows steps on rank 0, with metrics that are already reduced: no rank takes part in a collective alone."""

    shown = ("loss", "rao/target_error", "rewards/margins", "rewards/accuracies", "tokens_per_second", "perf/mfu")

    def start(self, session: Session) -> None:
        self._progress = Progress(
            session.loss.objective.name,
            unit="step",
            total=session.max_steps,
            done=session.step,
            shown=session.is_first_rank,
        ).__enter__()

    def after_step(self, session: Session) -> None:
        of_step = session.reported()
        metrics = {name: of_step[name] for name in self.shown if name in of_step}
        self._progress.update(session.step, metrics=metrics)

    def end(self, session: Session) -> None:
        self._progress.__exit__(None, None, None)
