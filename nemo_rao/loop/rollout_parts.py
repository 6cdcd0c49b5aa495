"""Parts of a rollout: samples, scores and rewards, log-probabilities of the policy and of the reference.

Every function here is a collective over all ranks, and returns its result on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.loop.data import AlignmentData
from nemo_rao.loop.first_rank import from_first_rank
from nemo_rao.loop.prepared import OnlineTask
from nemo_rao.loop.session import Session
from nemo_rao.mcore.checkpoint import load_weights
from nemo_rao.objectives.base import Needs
from nemo_rao.rollout.decode import Sampling
from nemo_rao.rollout.log_probs import LogProbs, rollout_log_probs
from nemo_rao.rollout.reference import ReferenceWeights, reference_weights
from nemo_rao.rollout.reward_model import RewardModel
from nemo_rao.rollout.sampler import MegatronSampler, Sampler, Wanted
from nemo_rao.rollout.samples import Rollout, RolloutData
from nemo_rao.rollout.text import SampleText
from nemo_rao.rollout.vllm_sampler import VllmSampler


class RolloutParts:
    """Samples from the policy of a run and scores the samples, for training and for validation prompts.

    Args:
        keys: ``online`` of the recipe.
        task: prompts and scorers.
        end_tokens: tokens that end a response.
        adapters: the run trains only adapters.
        needs: needs of the objective.
        start: directory of the weights that the run started from; ``None``: random weights.
    """

    def __init__(
        self,
        keys: OnlineConfig,
        task: OnlineTask,
        *,
        end_tokens: Sequence[int],
        adapters: bool,
        needs: Needs,
        start: Path | None,
    ) -> None:
        self._keys = keys
        self._task = task
        self._end_tokens = end_tokens
        self._adapters = adapters
        self._needs = needs
        self._start = start
        self._reference: ReferenceWeights | None = None
        self._sampler: Sampler | None = None
        self._reward_models: list[RewardModel] = []

    def load_reward_models(self) -> None:
        """Load the reward models, once and before anything is scored."""
        self._reward_models = [RewardModel(one.name, one.load()) for one in self._task.token_scorers]

    def keep_reference(self, session: Session) -> None:
        """Keep the reference policy's weights if the objective needs them, once and before anything is sampled.

        Adapters must have been added to the model.
        """
        if self._reference is None and self._needs.reference:
            self._reference = reference_weights(
                session.chunks, adapters=self._adapters, resumed=session.step > 0, load_start=self._load_start
            )

    def sampled(self, session: Session, data: RolloutData, prompts: np.ndarray, number: int) -> Rollout:
        """Sample responses.

        Args:
            prompts: ``[S]``, the prompt of each slot, as its index in the data.
            number: number of the rollout, on which the draws depend.
        """
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

    def rewarded(self, data: AlignmentData, text: SampleText, micro_batch_size: int) -> Rollout:
        """Return the rollout that the data holds, with its scores and rewards.

        Args:
            text: text of the data's prompts.
            micro_batch_size: number of slots.

        Raises:
            RankFailure: a scorer has failed.
        """
        held, keys = data.data, self._keys
        assert isinstance(held, RolloutData) and held.rollout is not None, "it has been sampled"
        rollout = held.rollout
        scores = dict(
            from_first_rank(lambda: self._task.text_scorers([text.row(held, slot) for slot in range(len(held))]))
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
        """Compute the reference policy's log-probabilities of the rollout that the data holds."""
        assert self._reference is not None, "the objective needs a reference"
        with self._reference.in_place():
            return self._log_probs(session, data, micro_batch_size, of_tokens=self._needs.tokens)

    def policy_log_probs(self, session: Session, data: AlignmentData, micro_batch_size: int) -> LogProbs:
        """Compute each token's log-probability under the current policy, and its value if there is a value head."""
        return self._log_probs(
            session, data, micro_batch_size, of_tokens=True, of_values=self._needs.values == "tokens"
        )

    def notes(self) -> list[str]:
        """Return what the scorers report at the end of the run. On rank 0."""
        return self._task.text_scorers.notes()

    def close(self) -> None:
        """Release the scorers and the sampler."""
        self._task.text_scorers.close()
        if self._sampler is not None:
            self._sampler.close()

    def _made_sampler(self, session: Session) -> Sampler:
        keys = self._keys
        common: dict[str, Any] = {
            "max_new_tokens": keys.max_new_tokens,
            "end_tokens": self._end_tokens,
            "sampling": Sampling(keys.temperature, keys.top_k, keys.top_p),
            "rows_at_once": keys.rows_at_once,
            "seed": keys.seed,
        }
        if self._task.vllm is not None:
            return VllmSampler(self._task.vllm, session.folder, **common)
        return MegatronSampler(vocab_size=session.loss.vocab_size, **common)

    def _log_probs(
        self,
        session: Session,
        data: AlignmentData,
        micro_batch_size: int,
        *,
        of_tokens: bool,
        of_values: bool = False,
    ) -> LogProbs:
        assert isinstance(data.data, RolloutData) and data.data.rollout is not None, "it has been sampled"
        return rollout_log_probs(
            session.chunks,
            data.data.rollout,
            data.micro_batch,
            micro_batch_size=micro_batch_size,
            vocab_size=session.loss.vocab_size,
            of_tokens=of_tokens,
            of_values=of_values,
        )

    def _load_start(self, chunks: Sequence[Any]) -> None:
        assert self._start is not None, "checked before the run"
        load_weights(self._start, chunks)
