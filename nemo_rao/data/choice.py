"""Which of a prompt's K responses are used, and what decides that one is better than another.

    responses   all: every response
                best_worst: the best and the worst; of equal ones the first
                best_random: the best, and one of those worse than it, drawn once for each prompt
    pairs_by    auto: labels (chosen, rejected) where the data has them, else rewards
                label: labels, which every row must have
                reward: rewards, which every response must have, even against the labels

The best is found by the same: where a row's order is a preference (best first), by this order, whatever the rewards
are. Rows of two responses are left as they are. Where all rewards are equal there is no best response: the first two
stay.
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
    """The row with its order a preference, or not, as ``pairs_by`` says.

    Raises:
        UserError: it has no labels, or a response has no reward, where these are to decide.
    """
    if pairs_by == "label" and not row.ranked:
        raise UserError(
            f"{row.place}: has no labels (chosen, rejected), but data.pairs_by is label; set it to reward or auto"
        )
    if pairs_by == "reward":
        _require_rewards(row, "data.pairs_by is reward")
        return replace(row, ranked=False)
    return row


def num_used(num_responses: int, responses: Responses) -> int:
    """How many of a prompt's ``num_responses`` are used."""
    return num_responses if responses == "all" else min(2, num_responses)


def first_responses(row: Row, number: int | None) -> Row:
    """The row with its first ``number`` responses; ``None``: with all. Of labelled ones, two are left at least."""
    if number is None or (row.ranked and number < 2):
        number = len(row.responses) if number is None else 2
    return row if len(row.responses) <= number else replace(row, responses=row.responses[:number])


def choose_responses(row: Row, responses: Responses, *, seed: int, number: int) -> Row:
    """The row with the responses that are used, of one that :func:`prefer_by` gives.

    Args:
        seed, number: the draw of ``best_random`` is a function of these: of the data's seed, and of the row's number.

    Raises:
        UserError: a response has no reward by which to choose.
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
    """Which two responses are compared of a row as it is used, and what says so. Of a row that can be compared."""
    by = "label" if used.ranked else "reward"
    if len(used.responses) > 2:
        return f"every two by {by}"
    if used.ranked and len(read.responses) == 2:
        return "chosen and rejected by label"
    return f"best and a worse one at random, by {by}" if responses == "best_random" else f"best and worst by {by}"


def has_pair(row: Row) -> bool:
    """One of its responses is better than another. Of a row that can be compared."""
    return len(row.responses) > 1 and (row.ranked or len({response.reward for response in row.responses}) > 1)


def where_to_add_rewards(row: Row) -> str:
    """The remedy for a response without a reward. The fields of pairs cannot be chosen."""
    if row.ranked:
        where = "add score_chosen and score_rejected (NeMo-Aligner: chosen_reward and rejected_reward)"
    else:
        where = "add it, or name the field it stands in by data.reward_field"
    return f"{where}; data.bad_rows=drop drops and counts such rows"


def _require_rewards(row: Row, why: str) -> None:
    for number, response in enumerate(row.responses, start=1):
        if not is_known(response.reward):
            raise UserError(
                f"{row.place}: response {number} has {lacks(response)}, and {why}; {where_to_add_rewards(row)}"
            )


def is_known(reward: float | None) -> TypeGuard[float]:
    """Neither missing nor NaN, which stands for a number that is not finite."""
    return reward is not None and not math.isnan(reward)


def lacks(response: Response) -> str:
    """What is wrong with a reward that is not known."""
    return "no reward" if response.reward is None else "a reward that is not a finite number"
