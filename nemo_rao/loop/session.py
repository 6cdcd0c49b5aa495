"""The interface between a run and the engine that drives it: what an engine provides, and what it calls.

An engine (:mod:`nemo_rao.engines`) builds model, optimizer and data source from a recipe and owns the training loop.
Everything else that happens around the steps is written once, as a :class:`Hook` against a :class:`Session`. The
engine's callbacks only call the hooks, in order, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nemo_rao.runtime.metrics_file import append_metrics

if TYPE_CHECKING:
    from nemo_rao.batch import MicroBatch
    from nemo_rao.loop.data import TrainingData
    from nemo_rao.loop.loggers import Logger
    from nemo_rao.mcore.objective_loss import ObjectiveLoss

METRICS = "metrics.jsonl"  # in the run's directory


class Session(Protocol):
    """One rank's view of a run.

    Attributes:
        chunks: this rank's model chunks, as Megatron's schedules take them.
        step: optimizer steps done; in ``after_step``, with the one just done.
        max_steps: optimizer steps of the whole run.
        is_first_rank: rank 0, which writes files and console output.
        is_stopping: the run ends after this step.
        folder: directory of the run.
        data: training data.
        loss: loss of the objective.
        loggers: loggers besides ``metrics.jsonl``; empty except on rank 0.
    """

    @property
    def chunks(self) -> Sequence[Any]: ...

    @property
    def step(self) -> int: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def is_first_rank(self) -> bool: ...

    @property
    def is_stopping(self) -> bool: ...

    @property
    def folder(self) -> Path: ...

    @property
    def data(self) -> TrainingData: ...

    @property
    def loss(self) -> ObjectiveLoss: ...

    @property
    def loggers(self) -> Sequence[Logger]: ...

    def reported(self) -> Mapping[str, float]:
        """Metrics of the completed step: the engine's (``grad_norm``, ``lr``) and those of :meth:`report`."""

    def report(self, values: Mapping[str, float]) -> None:
        """Add metrics, equal on every rank, to those of the completed step; checkpoints are ranked by them."""

    def stop(self) -> None:
        """End the run after this step, with a checkpoint, as after its last step."""

    def save(self) -> None:
        """Write the run's last checkpoint between two steps, as at its end. A collective of all ranks.

        Nothing is written if ``exp_manager.checkpoint_callback_params.save_last`` is false.
        """

    def sharded_weights(self) -> Mapping[str, Any]:
        """Return the model's sharded state dict, as in Megatron's checkpoints."""


class Hook:
    """Callbacks around the steps. Every method is called on all ranks."""

    def start(self, session: Session) -> None:
        """Called before the first step of this start, with its initial weights."""

    def before_step(self, session: Session) -> None:
        """Called before a step's first micro-batch."""

    def micro_batch(self, session: Session, batch: MicroBatch, *, embeds_tokens: bool) -> None:
        """Called before a model chunk runs a micro-batch; ``embeds_tokens``: it is the pipeline's first."""

    def after_step(self, session: Session) -> None:
        """Called after the optimizer's step, before its checkpoint is written."""

    def save(self, session: Session, folder: Path) -> None:
        """Write the hook's part of a checkpoint to its directory, before the checkpoint counts as complete.

        It must be on disk when this returns, on every rank, even if the model is written in the background.
        """

    def end(self, session: Session) -> None:
        """Called after the last step of this start, before its checkpoint is written."""

    def close(self) -> None:
        """Called after the last checkpoint."""


def log(session: Session, values: Mapping[str, float], *, to_loggers: bool = True) -> None:
    """Report metrics, equal on every rank, after the optimizer steps done so far.

    They go to the engine, to ``metrics.jsonl``, and with ``to_loggers`` to TensorBoard and other loggers.

    There is one step axis, the number of optimizer steps done, used by ``metrics.jsonl``, all loggers, the names of
    checkpoints and the metric that ranks them.
    """
    session.report(values)
    if session.is_first_rank:
        append_metrics(session.folder / METRICS, {"step": session.step, **values})
    if to_loggers:
        for logger in session.loggers:
            logger.log(values, session.step)
