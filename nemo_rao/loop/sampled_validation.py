"""Validation by sampling: responses to held-out prompts, and their rewards."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.rollout_parts import RolloutParts
from nemo_rao.loop.session import Session, log
from nemo_rao.loop.validation import EvaluatesAtIntervals
from nemo_rao.objectives.base import Needs
from nemo_rao.rollout.metrics import metrics
from nemo_rao.rollout.samples import RolloutData
from nemo_rao.rollout.text import SampleText

# The draws depend on a rollout number: this one is the same in every validation, and not that of any rollout.
_DRAWS = 2**32 - 1


class ValidateSamples(EvaluatesAtIntervals):
    """Samples responses to every validation prompt: before the first step, at intervals, and at the end.

    The metrics of :mod:`nemo_rao.rollout.metrics` are reported as ``val/<metric>``. Must come after
    :class:`nemo_rao.loop.rollouts.MakeRollouts`, which loads the reward models and keeps the reference.

    Args:
        data: data that wraps a :class:`nemo_rao.rollout.samples.RolloutData` with a slot for each prompt.
        text: text of these prompts.
        parts: samples and scores responses.
        needs: needs of the objective.
        intervals: see :class:`nemo_rao.loop.validation.EvaluatesAtIntervals`.
        micro_batch_size: number of prompts.
    """

    def __init__(
        self,
        data: AlignmentData,
        text: SampleText,
        parts: RolloutParts,
        needs: Needs,
        *,
        intervals: Collection[int],
        micro_batch_size: int,
    ) -> None:
        super().__init__(intervals)
        self._data = data
        self._text = text
        self._parts = parts
        self._needs = needs
        self._micro_batch_size = micro_batch_size

    def before_step(self, session: Session) -> None:
        if session.step == 0:
            self.once(session)

    def evaluate(self, session: Session) -> None:
        held = self._data.data
        assert isinstance(held, RolloutData), "constructed with one"
        held.rollout = self._parts.sampled(session, held, np.arange(len(held)), _DRAWS)
        scored = self._parts.rewarded(self._data, self._text, self._micro_batch_size)
        reference = None
        if self._needs.reference:
            reference = self._parts.reference_log_probs(session, self._data, self._micro_batch_size).sums
        found = metrics(replace(scored, reference=reference))
        log(session, {f"val/{name.removeprefix('rollout/')}": value for name, value in found.items()})
