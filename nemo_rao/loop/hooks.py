"""Small hooks around the steps: random numbers, scales, mismatched rows, progress."""

from __future__ import annotations

from collections.abc import Callable

from nemo_rao.loop.session import Hook, Session
from nemo_rao.mcore.calibration import calibrate
from nemo_rao.mcore.mismatched import mean_log_ratio
from nemo_rao.mcore.seeds import seed_step
from nemo_rao.runtime.progress import Progress


class SeedEveryStep(Hook):
    """Seeds the random numbers of each step; see :mod:`nemo_rao.mcore.seeds`.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self, session: Session) -> None:
        seed_step(self._seed, session.step)


class CalibrateScales(Hook):
    """Calibrates scales for delayed scaling before anything is computed (:mod:`nemo_rao.mcore.calibration`).

    Checkpoints include the scales, so a resumed run does not calibrate.
    """

    def start(self, session: Session) -> None:
        if session.step == 0:
            data = session.data
            calibrate(session.chunks, data.micro_batches_of_step(0), make_micro_batch=data.train.micro_batch)


class RecordStart(Hook):
    """Lets rank 0 record the run before the first step of this start, once all checks have passed."""

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record

    def start(self, session: Session) -> None:
        if session.is_first_rank:
            self._record()


class MismatchedPass(Hook):
    """Computes the mean log-ratio of mismatched rows (a step's prompts with responses to others) for the loss."""

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
    """Shows progress on rank 0, with metrics that are already reduced, so it needs no collective."""

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
