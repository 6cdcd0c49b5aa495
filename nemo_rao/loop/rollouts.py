"""Before the first step on each rollout: samples of the policy, their rewards and reference log-probabilities."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_rao.batch import RewardSummary
from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.errors import RankFailure
from nemo_rao.loop.critic import TrainCritic
from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.online_data import OnlineData
from nemo_rao.loop.prepared import OnlineTask
from nemo_rao.loop.samples_file import write_samples
from nemo_rao.loop.session import Hook, Session, log
from nemo_rao.mcore.checkpoint import load_weights
from nemo_rao.objectives.base import Needs, SampledTokens
from nemo_rao.rollout.decode import Sampling
from nemo_rao.rollout.log_probs import LogProbs, rollout_log_probs
from nemo_rao.rollout.metrics import importance, metrics
from nemo_rao.rollout.reference import ReferenceWeights, reference_weights
from nemo_rao.rollout.reward_model import RewardModel
from nemo_rao.rollout.sampler import MegatronSampler, Sampler, Wanted
from nemo_rao.rollout.samples import Rollout, RolloutData, load
from nemo_rao.rollout.text import SampleText
from nemo_rao.rollout.vllm_sampler import VllmSampler
from nemo_rao.runtime.console import say
from nemo_rao.runtime.files import remove_unfinished_files

ROLLOUTS = "rollouts"  # in the run folder

_T = TypeVar("_T")


class MakeRollouts(Hook):
    """Fills the run's data with a rollout before the first step on it.

    Each part of a rollout is written to ``rollouts/`` as soon as it is there. A run that was interrupted goes on with
    what it finds of the rollout at hand and, in the midst of one, needs it.

    Args:
        keys: of the recipe.
        task: what is sampled, and what samples are worth.
        tokenizer: of Hugging Face.
        adapters: only they are trained.
        needs: of the objective.
        start: the folder of the weights that the run started with; ``None`` for random ones.
        critic: a model that gives tokens their values; ``None``: the policy does, where they are needed.
    """

    def __init__(
        self,
        keys: OnlineConfig,
        task: OnlineTask,
        *,
        tokenizer: Any,
        adapters: bool,
        needs: Needs,
        start: Path | None,
        critic: TrainCritic | None = None,
    ) -> None:
        assert keys.num_generations is not None, "the run samples"
        self._keys = keys
        self._num_generations = keys.num_generations
        self._task = task
        self._text = SampleText(tokenizer, task.prompts)
        self._adapters = adapters
        self._needs = needs
        self._start = start
        self._critic = critic
        self._at = -1  # the rollout that the data holds
        self._reference: ReferenceWeights | None = None
        self._sampler: Sampler | None = None
        self._reward_models: list[RewardModel] = []
        self._metrics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def start(self, session: Session) -> None:
        self._keys_of_objective = session.loss.config  # before they are resolved with the rewards of a rollout
        number, _ = _data(session).rollout_of(session.step)
        if session.is_first_rank:  # those that the steps to come make anew
            remove_unfinished_files(session.folder / ROLLOUTS)
            _remove(session.folder, lambda one: one > number or session.step == 0)
        torch.distributed.barrier()
        self._reward_models = [RewardModel(one.name, one.load()) for one in self._task.token_scorers]

    def before_step(self, session: Session) -> None:
        data = _data(session)
        if self._reference is None and self._needs.reference:
            # Not at the start: adapters are added after that.
            self._reference = reference_weights(
                session.chunks, adapters=self._adapters, resumed=session.step > 0, load_start=self._load_start
            )
        number, is_first = data.rollout_of(session.step)
        if number == self._at:
            return
        self._seconds = {}
        rollout = self._made(session, data, number, may_sample=is_first)
        data.rollout_data.rollout, data.train.reference = rollout, rollout.reference
        of_objective = self._advantages(session, data, rollout)
        data.rollout_data.advantages = {**data.rollout_data.advantages, **self._importance(rollout)}
        assert rollout.rewards_so_far is not None
        total, count = rollout.rewards_so_far.tolist()
        session.loss.config = session.loss.objective.resolve(
            self._keys_of_objective, RewardSummary(mean=total / max(count, 1))
        )
        self._at = number
        self._metrics = {**metrics(rollout, self._keys.vllm_importance_cap), **of_objective, **self._seconds}
        for phase, seconds in self._seconds.items():
            self._metrics[phase.replace("seconds", "tokens_per_second")] = float(rollout.lengths.sum()) / seconds

    def after_step(self, session: Session) -> None:
        _, was_first = _data(session).rollout_of(session.step - 1)
        if was_first:
            log(session, self._metrics)
            is_shown = (session.step - 1) % self._keys.log_samples_every == 0 or session.step == session.max_steps
            if session.is_first_rank and is_shown:
                write_samples(
                    session.folder,
                    session.step,
                    _data(session).train,
                    self._text,
                    self._keys.log_samples,
                    objective=session.loss.objective,
                    config=session.loss.config,
                )

    def end(self, session: Session) -> None:
        if session.is_first_rank:
            for line in self._task.text_scorers.notes():
                say(line)

    def close(self) -> None:
        self._task.text_scorers.close()
        if self._sampler is not None:
            self._sampler.close()

    # ------------------------------------------------------------------------------------------------ its parts

    def _made(self, session: Session, data: OnlineData, number: int, *, may_sample: bool) -> Rollout:
        """The rollout with all that the objective needs, as far as possible from its file."""
        path = _file(session.folder, number)

        def keep(rollout: Rollout) -> None:
            if session.is_first_rank:
                rollout.save(path)

        rollout = _of_first_rank(lambda: load(path))
        if rollout is not None and rollout.lengths.shape != (len(data.rollout_data), self._num_generations):
            rollout = None  # of a run with other keys
        if rollout is None:
            if not may_sample:
                raise _missing(path)
            if session.is_first_rank:
                oldest = _oldest(session.folder, data)
                _remove(session.folder, lambda one: one < oldest)
            with self._timed("rollout"):
                rollout = self.sampled(session, data.rollout_data, data.prompts_of_rollout(number), number)
            keep(rollout)
        data.rollout_data.rollout, data.train.reference = rollout, None
        data.rollout_data.advantages = {}  # those of the rollout before
        if rollout.rewards is None:
            before = self._rewards_before(session.folder, number)
            try:
                with self._timed("reward"):
                    rollout = self.rewarded(data.train, self._text, data.micro_batch_size)
            except RankFailure as failure:  # of all ranks
                raise RankFailure(f"{failure}. {self._saved(session)}") from failure
            assert rollout.rewards is not None
            known = rollout.rewards[~np.isnan(rollout.rewards)]
            rollout = replace(rollout, rewards_so_far=before + np.array([known.sum(), len(known)]))
            keep(rollout)
        if rollout.reference is None and self._needs.reference:
            with self._timed("reference"):
                found = self.reference_log_probs(session, data.train, data.micro_batch_size)
            rollout = replace(rollout, reference=found.sums, reference_logps=found.tokens)
            keep(rollout)
        # A single step is taken by the policy that sampled, whose ratio to itself is 1. What vLLM has sampled is always
        # held against the training model.
        of_values = self._has_values or self._critic is not None  # what uses them asks for the pass
        wanted = self._needs.tokens and (of_values or data.steps_per_rollout > 1)
        if rollout.old_logps is None and (wanted or self._task.vllm is not None):
            with self._timed("old"):
                found = self._log_probs(
                    session, data.train, data.micro_batch_size, of_tokens=True, values=self._has_values
                )
            rollout = replace(rollout, old_logps=found.tokens, values=found.values)
            keep(rollout)
        if rollout.values is None and self._critic is not None:
            with self._timed("values"):
                rollout = replace(rollout, values=self._critic.values(rollout, data.train, data.micro_batch_size))
            keep(rollout)
        return rollout

    def _advantages(self, session: Session, data: OnlineData, rollout: Rollout) -> dict[str, float]:
        """Compute the objective's advantages and put them into the data; returns their metrics.

        They are not stored: they follow from what is.
        """
        compute = session.loss.objective.advantages
        if compute is None:
            return {}
        assert rollout.rewards is not None and rollout.old_logps is not None and rollout.values is not None
        sampled = SampledTokens(
            lengths=rollout.lengths.flatten(),
            rewards=rollout.rewards.flatten(),
            old=rollout.old_logps,
            reference=rollout.reference_logps,
            values=rollout.values,
        )
        found = compute(sampled, self._keys_of_objective)
        data.rollout_data.advantages = {"advantages": found.advantages, "returns": found.returns}
        return dict(found.metrics)

    def _importance(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """By how much tokens count because another policy than the one in training has sampled them."""
        cap = self._keys.vllm_importance_cap
        return {} if cap is None else {"importance": importance(rollout, cap)}

    def sampled(self, session: Session, data: RolloutData, prompts: np.ndarray, number: int) -> Rollout:
        """Responses to ``[S]`` prompts, by their numbers in the data; ``number`` names the draws."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        slots = range(rank, len(prompts), size)
        self._sampler = self._sampler or self._made_sampler(session)
        found = self._sampler.sample(
            session.chunks,
            [Wanted(data.prompt(int(prompts[slot])), number, slot, data.responses_per_slot) for slot in slots],
        )
        of_ranks: list[Any] = [None] * size
        torch.distributed.all_gather_object(of_ranks, found, group=parallel_state.get_data_parallel_group())
        return Rollout.of(prompts.tolist(), [of_ranks[slot % size][slot // size] for slot in range(len(prompts))])

    def _made_sampler(self, session: Session) -> Sampler:
        keys = self._keys
        common: dict[str, Any] = {
            "max_new_tokens": keys.max_new_tokens,
            "end_tokens": self._text.end_tokens,
            "sampling": Sampling(keys.temperature, keys.top_k, keys.top_p),
            "rows_at_once": keys.rows_at_once,
            "seed": keys.seed,
        }
        if self._task.vllm is not None:
            return VllmSampler(self._task.vllm, session.folder, **common)
        return MegatronSampler(vocab_size=session.loss.vocab_size, **common)

    def _rewards_before(self, folder: Path, number: int) -> np.ndarray:
        """``[2]`` sum and number of the rewards of all rollouts before this one."""
        if number == 0:
            return np.zeros(2)
        before = _of_first_rank(lambda: load(_file(folder, number - 1)))
        if before is None or before.rewards_so_far is None:
            raise _missing(_file(folder, number - 1))
        return before.rewards_so_far

    def rewarded(self, data: AlignmentData, text: SampleText, micro_batch_size: int) -> Rollout:
        """The rollout that the data holds, with scores and rewards."""
        held, keys = data.data, self._keys
        assert isinstance(held, RolloutData) and held.rollout is not None, "it has been sampled"
        rollout = held.rollout
        scores = dict(
            _of_first_rank(lambda: self._task.text_scorers([text.row(held, slot) for slot in range(len(held))]))
        )
        for model in self._reward_models:
            scores[model.name] = model.scores(rollout, data.micro_batch, micro_batch_size=micro_batch_size)
        rewards = sum(
            (self._task.weights.get(name, 1.0) * of_scorer for name, of_scorer in scores.items()),
            start=np.zeros(rollout.lengths.shape),
        )
        if keys.cut_responses != "score":
            rewards[rollout.is_cut] = keys.cut_reward if keys.cut_responses == "penalty" else np.nan
        return replace(rollout, rewards=rewards, scores=scores)

    def reference_log_probs(self, session: Session, data: AlignmentData, micro_batch_size: int) -> LogProbs:
        """Of the rollout that the data holds, under the reference policy."""
        assert self._reference is not None, "the objective needs one"
        with self._reference.in_place():
            return self._log_probs(session, data, micro_batch_size, of_tokens=self._needs.tokens)

    def _saved(self, session: Session) -> str:
        """Saves the run as it is before this step, unless it is saved; says where the same command goes on."""
        found = _of_first_rank(lambda: last_checkpoint(session.folder))
        if session.step and (found is None or step_of(found) < session.step):
            session.save()
            found = _of_first_rank(lambda: last_checkpoint(session.folder))
        return "The same command starts anew" if found is None else f"The same command goes on from {found}"

    @property
    def _has_values(self) -> bool:
        return self._needs.values == "tokens"

    def _log_probs(
        self, session: Session, data: AlignmentData, micro_batch_size: int, *, of_tokens: bool, values: bool = False
    ) -> LogProbs:
        assert isinstance(data.data, RolloutData) and data.data.rollout is not None, "it has been sampled"
        return rollout_log_probs(
            session.chunks,
            data.data.rollout,
            data.micro_batch,
            micro_batch_size=micro_batch_size,
            vocab_size=session.loss.vocab_size,
            of_tokens=of_tokens,
            of_values=values,
        )

    def _load_start(self, chunks: Sequence[Any]) -> None:
        assert self._start is not None, "checked before the run"
        load_weights(self._start, chunks)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[f"seconds/{name}"] = time.perf_counter() - started


def _data(session: Session) -> OnlineData:
    data = session.data
    assert isinstance(data, OnlineData), "the run samples"
    return data


def _of_first_rank(compute: Callable[[], _T]) -> _T:
    """What rank 0 computes, on every rank; a failure there is one of all ranks."""
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found = [compute(), None]
        except RankFailure as failure:
            found = [None, str(failure)]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise RankFailure(found[1])
    result: _T = found[0]
    return result


def _file(folder: Path, number: int) -> Path:
    return folder / ROLLOUTS / f"{number:06d}.npz"


def _missing(path: Path) -> RankFailure:
    return RankFailure(
        f"{path} is missing, or of other keys: samples and rewards that the step at hand goes on from; restore it, or "
        "start a new run under another exp_manager.name"
    )


def _oldest(folder: Path, data: OnlineData) -> int:
    """The first rollout that a restart may ask for: that of the last checkpoint, and of the one before it the rewards
    so far."""
    kept = last_checkpoint(folder)
    return 0 if kept is None else data.rollout_of(step_of(kept))[0] - 1


def _remove(folder: Path, which: Callable[[int], bool]) -> None:
    for path in (folder / ROLLOUTS).glob("*.npz"):
        if path.stem.isdigit() and which(int(path.stem)):
            path.unlink()
