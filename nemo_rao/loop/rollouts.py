"""Before the first step on each rollout: sample, score, compute log-probabilities, values and advantages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from nemo_rao.batch import RewardSummary
from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.errors import RankFailure
from nemo_rao.loop.critic import TrainCritic
from nemo_rao.loop.first_rank import from_first_rank
from nemo_rao.loop.online_data import OnlineData
from nemo_rao.loop.rollout_files import RolloutFiles
from nemo_rao.loop.rollout_parts import RolloutParts
from nemo_rao.loop.samples_file import drop_samples_after, write_samples
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.objectives.base import Needs, SampledTokens
from nemo_rao.rollout.metrics import importance, metrics
from nemo_rao.rollout.samples import Rollout
from nemo_rao.rollout.text import SampleText
from nemo_rao.runtime.console import say


class MakeRollouts(Hook):
    """Fills the run's data with a rollout before the first step on it.

    Each part of a rollout is written to ``rollouts/`` as soon as it is computed, and a restarted run reads back what it
    finds. A run that continues between two steps on one rollout needs the file: the policy that sampled it is gone.

    Args:
        keys: ``online`` of the recipe.
        parts: computes the parts of a rollout.
        text: of the training prompts.
        needs: of the objective.
        sampled_by_vllm: the sampler is not the training model.
        critic: a model that computes the values of tokens; ``None``: the policy does, if they are needed.
    """

    def __init__(
        self,
        keys: OnlineConfig,
        parts: RolloutParts,
        text: SampleText,
        *,
        needs: Needs,
        sampled_by_vllm: bool,
        critic: TrainCritic | None,
    ) -> None:
        self._keys = keys
        self._parts = parts
        self._text = text
        self._needs = needs
        self._sampled_by_vllm = sampled_by_vllm
        self._critic = critic
        self._current = -1  # number of the rollout that the data holds
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def start(self, session: Session) -> None:
        self._objective_keys = session.loss.config  # before they are resolved with the rewards of a rollout
        self._files = RolloutFiles(session.folder)
        number, _ = _data(session).rollout_of(session.step)
        if session.is_first_rank:  # what the remaining steps compute again
            self._files.remove_unfinished()
            self._files.remove(lambda one: one > number or session.step == 0)
            drop_samples_after(session.folder, session.step)
        torch.distributed.barrier()
        self._parts.load_reward_models()

    def before_step(self, session: Session) -> None:
        data = _data(session)
        self._parts.keep_reference(session)  # not in start(), which adapters are added after
        number, is_first = data.rollout_of(session.step)
        if number == self._current:
            return
        self._seconds = {}
        rollout = self._filled(session, data, number, may_sample=is_first)
        data.rollout_data.rollout, data.train.reference = rollout, rollout.reference
        of_objective = self._add_advantages(session, data, rollout)
        assert rollout.rewards_so_far is not None
        total, count = rollout.rewards_so_far.tolist()
        session.loss.config = session.loss.objective.resolve(
            self._objective_keys, RewardSummary(mean=total / max(count, 1))
        )
        self._current = number
        self._metrics = {**metrics(rollout, self._keys.vllm_importance_cap), **of_objective, **self._seconds}
        for phase, seconds in self._seconds.items():
            self._metrics[phase.replace("seconds", "tokens_per_second")] = float(rollout.lengths.sum()) / seconds

    def after_step(self, session: Session) -> None:
        data = _data(session)
        first = session.step - 1
        if not data.rollout_of(first)[1]:
            return
        log(session, self._metrics)
        # Some step on this rollout is a multiple of log_samples_every, or the run's last one.
        is_shown = (
            -first % self._keys.log_samples_every < data.steps_per_rollout
            or first + data.steps_per_rollout >= session.max_steps
        )
        if session.is_first_rank and is_shown:
            write_samples(
                session.folder,
                session.step,
                data.train,
                self._text,
                self._keys.log_samples,
                objective=session.loss.objective,
                config=session.loss.config,
            )

    def end(self, session: Session) -> None:
        if session.is_first_rank:
            for line in self._parts.notes():
                say(line)

    def close(self) -> None:
        self._parts.close()

    def _filled(self, session: Session, data: OnlineData, number: int, *, may_sample: bool) -> Rollout:
        """Return the rollout with everything that the objective needs, reading back what its file has."""
        train, size = data.train, data.micro_batch_size

        def keep(rollout: Rollout) -> None:
            if session.is_first_rank:
                self._files.save(number, rollout)

        rollout = self._files.load(number)
        if rollout is not None and rollout.lengths.shape != (len(data.rollout_data), self._keys.num_generations):
            rollout = None  # sampled with other keys
        if rollout is None:
            if not may_sample:
                raise self._files.missing(number)
            if session.is_first_rank:
                oldest = _oldest_needed(session, data)
                self._files.remove(lambda one: one < oldest)
            with self._timed("rollout"):
                rollout = self._parts.sampled(session, data.rollout_data, data.prompts_of_rollout(number), number)
            keep(rollout)
        data.rollout_data.rollout, train.reference = rollout, None
        data.rollout_data.advantages = {}  # of the previous rollout
        if rollout.rewards is None:
            before = self._files.rewards_before(number)
            try:
                with self._timed("reward"):
                    rollout = self._parts.rewarded(train, self._text, size)
            except RankFailure as failure:  # on every rank
                raise RankFailure(f"{str(failure).removesuffix('.')}. {_save_where_it_stopped(session)}") from failure
            assert rollout.rewards is not None
            known = rollout.rewards[~np.isnan(rollout.rewards)]
            rollout = replace(rollout, rewards_so_far=before + np.array([known.sum(), len(known)]))
            keep(rollout)
        if rollout.reference is None and self._needs.reference:
            with self._timed("reference"):
                found = self._parts.reference_log_probs(session, train, size)
            rollout = replace(rollout, reference=found.sums, reference_logps=found.tokens)
            keep(rollout)
        if rollout.old_logps is None and self._needs_old_logps(data):
            with self._timed("old"):
                found = self._parts.policy_log_probs(session, train, size)
            rollout = replace(rollout, old_logps=found.tokens, values=found.values)
            keep(rollout)
        if rollout.values is None and self._critic is not None:
            with self._timed("values"):
                rollout = replace(rollout, values=self._critic.values(rollout, train, size))
            keep(rollout)
        return rollout

    def _needs_old_logps(self, data: OnlineData) -> bool:
        """Whether a pass of the policy over the rollout's rows is needed, for its log-probabilities or its values.

        A rollout that serves one step needs none: that step's ratio is 1. What vLLM has sampled is always compared with
        the training model.
        """
        has_values = self._needs.values == "tokens" or self._critic is not None
        return self._sampled_by_vllm or (self._needs.tokens and (has_values or data.steps_per_rollout > 1))

    def _add_advantages(self, session: Session, data: OnlineData, rollout: Rollout) -> dict[str, float]:
        """Add advantages, returns and importance weights to the data, as far as the run has them.

        They follow from the rollout and are not stored.

        Returns:
            the objective's metrics of the rollout.
        """
        of_tokens: dict[str, np.ndarray] = {}
        of_rollout: dict[str, float] = {}
        compute, cap = session.loss.objective.advantages, self._keys.vllm_importance_cap
        if compute is not None:
            assert rollout.rewards is not None and rollout.old_logps is not None and rollout.values is not None
            sampled = SampledTokens(
                lengths=rollout.lengths.flatten(),
                rewards=rollout.rewards.flatten(),
                old=rollout.old_logps,
                reference=rollout.reference_logps,
                values=rollout.values,
            )
            found = compute(sampled, self._objective_keys)
            of_tokens |= {"advantages": found.advantages, "returns": found.returns}
            of_rollout |= found.metrics
        if cap is not None:
            of_tokens["importance"] = importance(rollout, cap)
        data.rollout_data.advantages = of_tokens
        return of_rollout

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[f"seconds/{name}"] = time.perf_counter() - started


def _data(session: Session) -> OnlineData:
    data = session.data
    assert isinstance(data, OnlineData), "the run samples"
    return data


def _oldest_needed(session: Session, data: OnlineData) -> int:
    """The first rollout that a restart may read: the one before that of the last checkpoint, for the rewards so far."""
    kept = last_checkpoint(session.folder)
    return 0 if kept is None else data.rollout_of(step_of(kept))[0] - 1


def _save_where_it_stopped(session: Session) -> str:
    """Save the run as it was before this step, unless that is saved; returns where the same command continues."""
    found = from_first_rank(lambda: last_checkpoint(session.folder))
    if session.step and (found is None or step_of(found) < session.step):
        session.save()
        found = from_first_rank(lambda: last_checkpoint(session.folder))
    return f"The same command {'starts anew' if found is None else f'continues from {found}'}"
