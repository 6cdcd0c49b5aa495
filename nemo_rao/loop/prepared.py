"""What a run's parent process prepares before the ranks start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nemo_rao.batch import Row
from nemo_rao.checkpoint.run_records import Change
from nemo_rao.config.model_config import ScheduleConfig
from nemo_rao.data.store import PreferenceData
from nemo_rao.rollout.vllm_model import VllmModel

if TYPE_CHECKING:
    from nemo_rao.mcore.trained_model import TrainedModel


class TextScorers(Protocol):
    """Scorers that read the samples' text. Called on rank 0 only."""

    def __call__(self, rows: Sequence[Row]) -> Mapping[str, np.ndarray]:
        """Return by scorer the ``[S, K]`` float64 scores of S rows with K responses; NaN if missing.

        Raises:
            RankFailure: a scorer has failed.
        """

    def notes(self) -> list[str]:
        """Return lines to report at the end of the run."""

    def close(self) -> None:
        """Release what the scorers hold."""


@dataclass(frozen=True)
class TokenScorer:
    """A reward model that reads the sampled tokens, on the ranks of the run.

    Attributes:
        name: name of the scorer.
        load: returns this rank's model chunks, with weights; a collective of all ranks, called inside the run.
    """

    name: str
    load: Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class CriticTask:
    """A critic that is a separate model, on the ranks of the run.

    Attributes:
        build: returns this rank's part; a collective of all ranks, called inside the run. ``build(True)`` does not load
            the weights to start from: a checkpoint will provide them.
        rate: its peak learning rate.
        schedule: its learning rate schedule.
        resume_from: directory written by :meth:`TrainedModel.save`; ``None`` at the run's start.
    """

    build: Callable[[bool], TrainedModel]
    rate: float
    schedule: ScheduleConfig
    resume_from: Path | None


@dataclass(frozen=True)
class OnlineTask:
    """The prompts that a run samples responses to, and how these are rewarded.

    Attributes:
        prompts: prompts of the training data, as text, for scorers.
        text_scorers: scorers that read the samples' text.
        token_scorers: scorers that read the samples' tokens.
        weights: weights of scorers in the reward, by name; 1 for the others.
        validation_prompts: prompts of the validation data, as text.
        vllm: the policy as vLLM loads it; ``None``: the training model samples.
        critic: the critic; ``None`` unless it is a separate model.
    """

    prompts: Sequence[Row]
    text_scorers: TextScorers
    token_scorers: Sequence[TokenScorer] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    validation_prompts: Sequence[Row] = ()
    vllm: VllmModel | None = None
    critic: CriticTask | None = None


@dataclass(frozen=True)
class Prepared:
    """Everything that the parent process prepares for the ranks.

    Attributes:
        train, validation: tokenized data.
        mismatched: the same prompts with responses to others, as "train" and "validation"; empty where not needed.
        pad_token_id: token that pads rows.
        objective_config: the objective's keys, with values that depend on the data resolved.
        max_steps: optimizer steps of the whole run.
        changes: changes of the data since an earlier start of the run; they are applied.
        finished_at: steps of a finished run that is not extended; its model is not checked.
        resume_from: this run's last checkpoint, or ``None`` at its start.
        start_from: checkpoint with the weights to start from, or ``None``.
        online: for a run that samples its own responses, its prompts and scorers; ``train`` has the prompts, too.
    """

    train: PreferenceData
    validation: PreferenceData | None
    mismatched: Mapping[str, PreferenceData]
    pad_token_id: int
    objective_config: Any
    max_steps: int
    changes: list[Change]
    finished_at: int | None
    resume_from: Path | None
    start_from: Path | None
    online: OnlineTask | None = None
