"""Rollouts: K sampled responses per prompt with their rewards and log-probabilities, in memory and on disk.

A rollout has S slots with one prompt each; a prompt that occurs twice has two slots. Its arrays are filled in stages:
tokens by sampling, rewards by scorers, reference log-probs by the reference policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_rao.batch import Sample
from nemo_rao.data.store import PreferenceData
from nemo_rao.rollout.decode import Sampled
from nemo_rao.runtime.files import written_atomically

_FORMAT = 1
_SCORES = "scores/"  # prefix of scorers' names in the file


@dataclass(frozen=True)
class Rollout:
    """S slots of K responses.

    Attributes:
        prompts: ``[S]`` int64, prompt indices in the run's data.
        tokens: int32, concatenated tokens of all responses, slot by slot.
        logps: float32, nats, log-prob of each token under the policy that sampled it.
        lengths: ``[S, K]`` int64, tokens per response.
        is_cut: ``[S, K]`` bool, whether a response reached its limit without an end token.
        rewards: ``[S, K]`` float64, NaN if missing; ``None``: not scored yet.
        scores: scorer -> ``[S, K]`` float64, NaN if missing; the rewards are their weighted sum.
        reference: ``[S * K, 2]`` float32, the reference's log-probs (prompt without t0, response; nats); ``None``: not
            computed yet.
        old_logps, reference_logps: float32, like ``logps``, under the sampling policy and the reference, by passes over
            whole rows; ``None``: not computed.
        values: float32, value of each token by the value head or critic before the first step on the rollout; ``None``:
            not computed.
        rewards_so_far: ``[2]`` float64, sum and count of the rewards of this and all earlier rollouts.
    """

    prompts: np.ndarray
    tokens: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    is_cut: np.ndarray
    rewards: np.ndarray | None = None
    reference: np.ndarray | None = None
    old_logps: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    values: np.ndarray | None = None
    rewards_so_far: np.ndarray | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def of(prompts: Sequence[int], sampled: Sequence[Sequence[Sampled]]) -> Rollout:
        """Build a rollout from the slots' responses, in order."""
        every = [one for of_slot in sampled for one in of_slot]
        shape = len(sampled), len(sampled[0])
        return Rollout(
            prompts=np.asarray(prompts, dtype=np.int64),
            tokens=np.concatenate([one.tokens for one in every]).astype(np.int32),
            logps=np.concatenate([one.logps for one in every]).astype(np.float32),
            lengths=np.array([len(one.tokens) for one in every], dtype=np.int64).reshape(shape),
            is_cut=np.array([one.is_cut for one in every], dtype=bool).reshape(shape),
        )

    def responses(self, slot: int) -> tuple[np.ndarray, ...]:
        """Tokens of a slot's K responses."""
        return self.of_tokens(self.tokens, slot)

    def response_logps(self) -> np.ndarray:
        """``[S, K]`` float64, nats, log-probability of each response under the policy that sampled it, from the pass
        over whole rows if there was one, else from sampling."""
        logps = self.logps if self.old_logps is None else self.old_logps
        starts = np.cumsum(self.lengths.flatten()) - self.lengths.flatten()
        return np.add.reduceat(logps.astype(np.float64), starts).reshape(self.lengths.shape)

    def of_tokens(self, values: np.ndarray, slot: int) -> tuple[np.ndarray, ...]:
        """Select the entries of a slot's K responses from an array over all tokens."""
        num = self.lengths.shape[1]
        ends = np.cumsum(self.lengths.flatten())
        first = int(ends[slot * num - 1]) if slot else 0
        return tuple(np.split(values[first : int(ends[(slot + 1) * num - 1])], np.cumsum(self.lengths[slot])[:-1]))

    def save(self, path: Path) -> None:
        """Write the rollout atomically."""
        known = {name: value for name, value in vars(self).items() if value is not None and name != "scores"}
        known |= {_SCORES + name: values for name, values in self.scores.items()}
        with written_atomically(path) as (file,):
            np.savez(file, format=np.array(_FORMAT), **known)


def load(path: Path) -> Rollout | None:
    """Read a file written by :meth:`Rollout.save`; ``None`` if there is none, or it has another format."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if int(stored["format"]) != _FORMAT:
            return None
        scores = {name.removeprefix(_SCORES): stored[name] for name in stored.files if name.startswith(_SCORES)}
        known = {name: stored[name] for name in stored.files if name != "format" and not name.startswith(_SCORES)}
        return Rollout(**known, scores=scores)


class RolloutData:
    """The current rollout, as a data set of S samples for :class:`nemo_rao.loop.data.AlignmentData`.

    Args:
        prompts: prompts of the run, as samples without responses.
        num_slots: S.
        num_responses: K.

    Attributes:
        rollout: the current one; ``None`` until something has been sampled.
        advantages: further per-token arrays, by their names in :class:`nemo_rao.batch.Tokens`.
    """

    def __init__(self, prompts: PreferenceData, *, num_slots: int, num_responses: int) -> None:
        self._prompts = prompts
        self._num_slots = num_slots
        self._num_responses = num_responses
        self.rollout: Rollout | None = None
        self.advantages: Mapping[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._num_slots

    def __getitem__(self, slot: int) -> Sample:
        assert self.rollout is not None, "nothing has been sampled yet"
        number, rollout = self._num_responses, self.rollout
        rewards = np.full(number, np.nan) if rollout.rewards is None else rollout.rewards[slot]
        numbers = {"old": rollout.old_logps, "reference": rollout.reference_logps, "old_values": rollout.values}
        numbers |= self.advantages
        return dataclasses.replace(
            self._prompts[int(rollout.prompts[slot])],
            responses=rollout.responses(slot),
            of_tokens={name: rollout.of_tokens(values, slot) for name, values in numbers.items() if values is not None},
            rewards=rewards,
            ensemble=np.zeros((number, 0)),
            reference_rewards=np.zeros(0),
        )

    def prompt(self, number: int) -> np.ndarray:
        """``[prompt tokens]`` int32 of one of the run's prompts."""
        return self._prompts[number].prompt

    @property
    def responses_per_slot(self) -> int:
        """K."""
        return self._num_responses

    @property
    def num_responses(self) -> int:
        return self._num_slots * self._num_responses

    def response_offset(self, slot: int) -> int:
        return slot * self._num_responses
