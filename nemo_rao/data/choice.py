"""Selection of a prompt's responses, and the order of preference among them.

    responses   all: every response
                best_worst: the best and the worst; the first one in case of ties
                best_random: the best, and one that is worse, drawn once per prompt
    pairs_by    auto: labels (chosen, rejected) if the data has them, else rewards
                label: labels; every row must have them
                reward: rewards, even against the labels; every response must have one

The same setting determines the best response: if a row's order is a preference (best first), it decides, whatever the
rewards are. Rows of two responses are left unchanged. If all rewards are equal, the first two responses are kept.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Literal, TypeGuard

from nemo_rao.batch import Response, Row
from nemo_rao.errors import UserError

Responses = Literal["all", "best_worst", "best_random"]
PairsBy = Literal["auto", "label", "reward"]

NO_PAIR = "no response better than another"


def prefer_by(row: Row, pairs_by: PairsBy) -> Row:
    """Return the row with ``ranked`` set according to ``pairs_by``.

    Raises:
        UserError: the row lacks the labels, or a response lacks the reward, that ``pairs_by`` requires.
    """
    if pairs_by == "label" and not row.ranked:
        raise UserError(
            f"{row.location}: has no labels (chosen, rejected), but data.pairs_by is label. Set it to reward or auto."
        )
    if pairs_by == "reward":
        _require_rewards(row, "data.pairs_by is reward")
        return replace(row, ranked=False)
    return row


def num_used(num_responses: int, responses: Responses) -> int:
    """Number of responses that are used of a prompt with ``num_responses``."""
    return num_responses if responses == "all" else min(2, num_responses)


def first_responses(row: Row, number: int | None) -> Row:
    """Return the row with its first ``number`` responses (``None``: all). Labeled rows keep at least two."""
    if number is None or (row.ranked and number < 2):
        number = len(row.responses) if number is None else 2
    return row if len(row.responses) <= number else replace(row, responses=row.responses[:number])


def choose_responses(row: Row, responses: Responses, *, seed: int, number: int) -> Row:
    """Return the row with only the responses that are used.

    Args:
        row: as returned by :func:`prefer_by`.
        seed, number: data seed and row number; ``best_random`` draws as a function of these two.

    Raises:
        UserError: a response has no reward, and the choice depends on it.
    """
    if num_used(len(row.responses), responses) == len(row.responses):
        return row
    if row.ranked:
        best, worst, others = 0, len(row.responses) - 1, list(range(1, len(row.responses)))
    else:
        _require_rewards(row, f"data.responses is {responses}")
        rewards = [response.reward or 0.0 for response in row.responses]
        best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
        others = [at for at, reward in enumerate(rewards) if reward < rewards[best]]
    if not others:
        return replace(row, responses=row.responses[:2])
    other = worst
    if responses == "best_random":
        other = random.Random(f"nemo_rao response {seed} {number}").choice(others)
    return replace(row, responses=(row.responses[best], row.responses[other]))


def which_pair(read: Row, used: Row, responses: Responses) -> str:
    """Describe which responses of a row are compared, and by what. The row must be comparable."""
    by = "label" if used.ranked else "reward"
    if len(used.responses) > 2:
        return f"every two by {by}"
    if used.ranked and len(read.responses) == 2:
        return "chosen and rejected by label"
    return f"best and a worse one at random, by {by}" if responses == "best_random" else f"best and worst by {by}"


def has_pair(row: Row) -> bool:
    """Whether one of the responses is better than another. The row must be comparable."""
    return len(row.responses) > 1 and (row.ranked or len({response.reward for response in row.responses}) > 1)


def where_to_add_rewards(row: Row) -> str:
    """Remedy for a response without a reward. The reward fields of pairs have fixed names."""
    if row.ranked:
        where = "Add score_chosen and score_rejected (NeMo-Aligner: chosen_reward and rejected_reward)"
    else:
        where = "Add it, or set data.reward_field to the field that holds it"
    return f"{where}. data.bad_rows=drop drops and counts such rows."


def _require_rewards(row: Row, why: str) -> None:
    for number, response in enumerate(row.responses, start=1):
        if not is_known(response.reward):
            raise UserError(
                f"{row.location}: response {number} has {lacks(response)}, and {why}. {where_to_add_rewards(row)}"
            )


def is_known(reward: float | None) -> TypeGuard[float]:
    """Whether the reward is neither missing nor NaN, which replaces values that are not finite."""
    return reward is not None and not math.isnan(reward)


def lacks(response: Response) -> str:
    """Describe why a response's reward is not known."""
    return "no reward" if response.reward is None else "a reward that is not a finite number"
