"""What is prepared for a run before its ranks are started."""

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
    """Scorers of samples by their text. Called on rank 0 alone."""

    def __call__(self, rows: Sequence[Row]) -> Mapping[str, np.ndarray]:
        """By scorer, ``[S, K]`` float64 scores of S rows with K responses; NaN where it gives none.

        Raises:
            RankFailure: a scorer has failed.
        """

    def notes(self) -> list[str]:
        """Lines to be reported at the end of the run."""

    def close(self) -> None:
        """Release what the scorers hold."""


@dataclass(frozen=True)
class TokenScorer:
    """A reward model that reads the sampled tokens, on the run's own ranks.

    Attributes:
        name: of the scorer.
        load: this rank's model chunks, with their weights; a collective of all ranks, inside the run.
    """

    name: str
    load: Callable[[], Sequence[Any]]


@dataclass(frozen=True)
class CriticTask:
    """A critic that is a separate model, on the run's own ranks.

    Attributes:
        build: returns this rank's part; a collective of all ranks, inside the run. ``build(True)`` does not read the
            weights that it starts from: a checkpoint brings its own.
        rate: its highest learning rate.
        schedule: of its learning rate.
        resume_from: the directory that :meth:`TrainedModel.save` has written; ``None`` at the run's start.
    """

    build: Callable[[bool], TrainedModel]
    rate: float
    schedule: ScheduleConfig
    resume_from: Path | None


@dataclass(frozen=True)
class OnlineTask:
    """What a run samples responses to, and how they are rewarded.

    Attributes:
        prompts: those of the training data, as text, for scorers.
        text_scorers: they read the samples' text.
        token_scorers: they read the samples' tokens.
        weights: of scorers' scores in the reward, by name; 1 for the others.
        validation_prompts: those of the validation data, likewise.
        vllm: the policy as vLLM loads it; ``None``: the training model samples.
        critic: ``None`` unless the objective has one that is a separate model.
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
    """What every rank needs and the parent has worked out.

    Attributes:
        train, validation: tokenised data.
        mismatched: the same prompts with responses to others, as "train" and "validation"; empty where not needed.
        pad_token_id: what fills rows after their end.
        objective_config: the objective's keys, with what depends on the data resolved.
        max_steps: optimizer steps of the whole run.
        changes: of the data, since an earlier start of the run; they are applied.
        finished_at: steps of a run that has ended and is not to be made longer; its model is not checked.
        resume_from: this run's last checkpoint, or ``None`` at its start.
        start_from: a checkpoint whose weights the run starts with, or ``None``.
        online: of a run that samples its own responses, what is sampled and rewarded; ``train`` has its prompts.
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
