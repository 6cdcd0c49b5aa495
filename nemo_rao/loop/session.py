"""The border between a run and the engine that drives it: what an engine shows of a run, and what it calls.

An engine (:mod:`nemo_rao.engines`) builds model, optimizer and data source from a recipe and owns the loop over steps.
Everything else that happens around them is written once, as a :class:`Hook` against a :class:`Session`, and the
engine's own callbacks only call the hooks, in their order, on every rank.
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

METRICS = "metrics.jsonl"  # in the run folder


class Session(Protocol):
    """One rank's view of a run.

    Attributes:
        chunks: this rank's model chunks, as Megatron's schedules take them.
        step: optimizer steps done; in ``after_step``, with the one just done.
        max_steps: those of the whole run.
        is_first_rank: rank 0, which writes files and speaks.
        is_stopping: the run ends after this step.
        folder: of the run.
        data: what it trains on.
        loss: its objective.
        loggers: where numbers go besides ``metrics.jsonl``; none but on rank 0.
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
        """The numbers of the step just done: the engine's own (``grad_norm``, ``lr``) and those of :meth:`report`."""

    def report(self, values: Mapping[str, float]) -> None:
        """Add numbers, the same on every rank, to those of the step just done: for the choice of checkpoints."""

    def stop(self) -> None:
        """End the run after this step, as at its last one: with a checkpoint."""

    def save(self) -> None:
        """Between two steps, write the run's last checkpoint, as at its end. A collective of all ranks.

        Nothing is written where ``exp_manager.checkpoint_callback_params.save_last`` is false.
        """

    def sharded_weights(self) -> Mapping[str, Any]:
        """The model's sharded state dict, as Megatron's checkpoints have it."""


class Hook:
    """Something that happens around the steps. What is called on one rank is called on all of them."""

    def start(self, session: Session) -> None:
        """Before the first step of this start, with the weights that it begins with."""

    def before_step(self, session: Session) -> None:
        """Before a step's first micro-batch."""

    def micro_batch(self, session: Session, batch: MicroBatch, *, embeds_tokens: bool) -> None:
        """Before a model chunk runs a micro-batch of a step; ``embeds_tokens``: it is the pipeline's first."""

    def after_step(self, session: Session) -> None:
        """After the optimizer's step, before a checkpoint of it is written."""

    def save(self, session: Session, folder: Path) -> None:
        """Write the hook's part of a checkpoint into its folder, before the checkpoint counts as finished.

        It is on disk when this returns on every rank, also where the model is written in the background.
        """

    def end(self, session: Session) -> None:
        """After the last step of this start, before its checkpoint is written."""

    def close(self) -> None:
        """After the last checkpoint."""


def log(session: Session, values: Mapping[str, float], *, to_loggers: bool = True) -> None:
    """Report numbers, the same on every rank, of the optimizer steps done so far.

    They go to the engine, to ``metrics.jsonl``, and where ``to_loggers`` to TensorBoard and the like.

    The step axis is one: optimizer steps done. It is that of ``metrics.jsonl``, of every logger, of checkpoints' names
    and of the metric by which they are ranked.
    """
    session.report(values)
    if session.is_first_rank:
        append_metrics(session.folder / METRICS, {"step": session.step, **values})
    if to_loggers:
        for logger in session.loggers:
            logger.log(values, session.step)
