"""Preferences among a prompt's K responses.

If a prompt's order is a preference (labels: chosen, rejected), the earlier of two responses is the better one.
Otherwise, if all of a prompt's responses have an explicit reward, it is the one with the higher reward. **Choice**:
labels take precedence over rewards (with ``data.pairs_by=reward``, the loader discards the labels); responses with
equal rewards do not form a pair, and prompts without a pair are left out of pairwise losses. Shape legend: see
:mod:`nemo_rao.batch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch


@dataclass(frozen=True)
class AllPairs:
    """Every pair of a prompt's responses in which one is better.

    Attributes:
        valid: ``[P, K, K]`` bool; [p, i, j] is true if response i is better than response j.
    """

    valid: Tensor

    def of_chosen(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P, K, K]``, the better response's value; 0 with zero gradient where there is no pair."""
        return torch.where(self.valid, values[:, :, None], 0)

    def of_rejected(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P, K, K]``, the worse response's value; 0 with zero gradient where there is no pair."""
        return torch.where(self.valid, values[:, None, :], 0)


@dataclass(frozen=True)
class BestAndWorst:
    """At most one pair per prompt.

    Attributes:
        chosen, rejected: ``[P]`` int64 in [0, K); arbitrary if there is no pair.
        valid: ``[P]`` bool, whether the prompt has a pair.
    """

    chosen: Tensor
    rejected: Tensor
    valid: Tensor

    def of_chosen(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P]``, the best responses' values; 0 with zero gradient where there is no pair."""
        return take(values, self.chosen, self.valid)

    def of_rejected(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P]``, the worst responses' values; 0 with zero gradient where there is no pair."""
        return take(values, self.rejected, self.valid)


def all_pairs(batch: ObjectiveBatch) -> AllPairs:
    """All pairs of each prompt's valid responses, by labels or by rewards; see the module's docstring."""
    num_responses = batch.valid.shape[-1]
    earlier = torch.ones(num_responses, num_responses, dtype=torch.bool, device=batch.valid.device).triu(1)
    rewards = _comparable_rewards(batch)
    higher = (rewards[:, :, None] > rewards[:, None, :]) & rewards_known(batch)[:, None, None]
    both_valid = batch.valid[:, :, None] & batch.valid[:, None, :]
    return AllPairs(both_valid & torch.where(batch.ranked[:, None, None], earlier, higher))


def best_and_worst(batch: ObjectiveBatch) -> BestAndWorst:
    """The best and the worst response of each prompt, the first one in case of ties. For metrics of any loss."""
    rewards, by_reward = _comparable_rewards(batch), rewards_known(batch)
    best, worst = _extreme(rewards, batch.valid), _extreme(-rewards, batch.valid)
    differ = by_reward & (_gather(rewards, best) > _gather(rewards, worst))
    first, last = _first(batch.valid), _last(batch.valid)
    return BestAndWorst(
        chosen=torch.where(batch.ranked, first, best),
        rejected=torch.where(batch.ranked, last, worst),
        valid=batch.valid.any(-1) & torch.where(batch.ranked, first != last, differ),
    )


def select_best(batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
    """The best response of each prompt: by labels, else by rewards if all are known, else the first.

    Returns:
        ``([P], [P])``: its index in [0, K), and whether the prompt has any response.
    """
    by_reward = rewards_known(batch) & ~batch.ranked
    best = _extreme(_comparable_rewards(batch), batch.valid)
    return torch.where(by_reward, best, _first(batch.valid)), batch.valid.any(-1)


def take(values: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """``values[p, index[p]]``, ``[P]``; 0 with zero gradient where not ``valid``."""
    return torch.where(valid, _gather(values, index), 0)


def rewards_known(batch: ObjectiveBatch) -> Tensor:
    """``[P]`` bool, whether all of the prompt's responses have a reward. True for a prompt without responses."""
    return (~batch.rewards.isnan() | ~batch.valid).all(-1)


def _comparable_rewards(batch: ObjectiveBatch) -> Tensor:
    """``[P, K]`` rewards, with 0 for unknown and invalid entries."""
    return torch.where(batch.valid & ~batch.rewards.isnan(), batch.rewards, 0)


def _extreme(values: Tensor, valid: Tensor) -> Tensor:
    """``[P]``, index of the largest valid value, the first one in case of ties."""
    return torch.where(valid, values, -torch.inf).argmax(-1)


def _first(valid: Tensor) -> Tensor:
    return valid.int().argmax(-1)


def _last(valid: Tensor) -> Tensor:
    return valid.shape[-1] - 1 - valid.flip(-1).int().argmax(-1)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
