"""Which of a prompt's K responses is the chosen one (w) and which the rejected one (l).

Where all of a prompt's responses have an explicit reward, the best and the worst of them; of equal ones the first.
Else, where their order is a preference, the first and the last. **Choice**: a prompt whose best and worst rewards are
equal has no pair, even if its order is a preference: a tie says that the order means nothing. Shape legend: see
:mod:`nemo_rao.batch`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rao.batch import ObjectiveBatch


@dataclass(frozen=True)
class Pairs:
    """One pair a prompt, at most.

    Attributes:
        chosen, rejected: ``[P]`` int64 in [0, K); anything in range where there is no pair.
        valid: ``[P]`` bool: the prompt has a pair.
    """

    chosen: Tensor
    rejected: Tensor
    valid: Tensor

    def of_chosen(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P]``, the chosen responses' values; 0 with zero gradient where there is no pair."""
        return take(values, self.chosen, self.valid)

    def of_rejected(self, values: Tensor) -> Tensor:
        """``[P, K]`` -> ``[P]``, the rejected responses' values; 0 with zero gradient where there is no pair."""
        return take(values, self.rejected, self.valid)


def select_pairs(batch: ObjectiveBatch) -> Pairs:
    """The best and the worst response of each prompt, by rewards or by order; see the module's description."""
    by_reward = _all_rewards_known(batch)
    best, worst = _extreme(batch.rewards, batch.valid), _extreme(-batch.rewards, batch.valid)
    rewards = torch.where(batch.valid & by_reward[:, None], batch.rewards, 0)
    differ = _gather(rewards, best) > _gather(rewards, worst)
    first, last = _first(batch.valid), _last(batch.valid)
    return Pairs(
        chosen=torch.where(by_reward, best, first),
        rejected=torch.where(by_reward, worst, last),
        valid=torch.where(by_reward, differ, batch.ranked & (first != last) & batch.valid.any(-1)),
    )


def select_best(batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
    """The best response of each prompt: by rewards where all are known, of equal ones the first; else the first.

    Returns:
        ``([P], [P])``: its index in [0, K), and whether the prompt has a response at all.
    """
    best = _extreme(batch.rewards, batch.valid)
    return torch.where(_all_rewards_known(batch), best, _first(batch.valid)), batch.valid.any(-1)


def take(values: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """``values[p, index[p]]``, ``[P]``; 0 with zero gradient where not ``valid``."""
    return torch.where(valid, _gather(values, index), 0)


def _all_rewards_known(batch: ObjectiveBatch) -> Tensor:
    """``[P]`` bool; also true of a prompt without responses, which never has a pair."""
    return (~batch.rewards.isnan() | ~batch.valid).all(-1)


def _extreme(values: Tensor, valid: Tensor) -> Tensor:
    """``[P]``: where the largest valid value is, the first of equal ones."""
    return torch.where(valid & ~values.isnan(), values, -torch.inf).argmax(-1)


def _first(valid: Tensor) -> Tensor:
    return valid.int().argmax(-1)


def _last(valid: Tensor) -> Tensor:
    return valid.shape[-1] - 1 - valid.flip(-1).int().argmax(-1)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[:, None])[:, 0]
