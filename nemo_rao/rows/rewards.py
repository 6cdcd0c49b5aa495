"""Rewards of responses: under the format's name or the user's names, or from a label."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.rows.fields import describe, read_number
from nemo_rao.rows.view import View

RewardField = str | Sequence[str] | None  # a name, the names of an ensemble, or the format's own


def read_reward(record: View, default: str, chosen: RewardField) -> tuple[float | None, tuple[float, ...]]:
    """Read (reward, ensemble) of the response in ``record``.

    A member of an ensemble may be null, which is stored as NaN; the reward is the mean of the others. If the format's
    reward field is missing, ``label`` is used: true is a reward of 1, false of 0.
    """
    if chosen is not None and not isinstance(chosen, str):
        columns = [_chosen_reward(record, name, may_be_null=True) for name in chosen]
        known = [reward for reward in columns if reward is not None]
        ensemble = tuple(math.nan if reward is None else reward for reward in columns)
        return (sum(known) / len(known) if known else None), ensemble
    if isinstance(chosen, str):
        return _chosen_reward(record, chosen), ()
    if default not in record and "label" in record:
        return _read_label(record["label"], record.location, record.path_of("label")), ()
    return read_number(record.get(default), record.location, record.path_of(default)), ()


def _read_label(value: object, location: str, field: str) -> float:
    if value in (0, 1) and isinstance(value, (bool, int)):
        return float(value)
    raise UserError(f"{location}: field '{field}' must be true or false, found {describe(value)}")


def _chosen_reward(record: View, chosen: str, may_be_null: bool = False) -> float | None:
    """The reward under the user's name, which may be a path and must exist."""
    here, value = record, None
    names = [chosen] if chosen in record or record.is_null(chosen) else chosen.split(".")
    for depth, name in enumerate(names):
        if may_be_null and here.is_null(name):
            return None
        value = here.required(name)
        if depth + 1 < len(names):
            if not isinstance(value, dict):
                raise UserError(
                    f"{record.location}: reward field '{chosen}' leads into {describe(value)}. Name another reward "
                    "field."
                )
            here = here.inside(name)
    if chosen.endswith(".Rating") and isinstance(value, str):  # UltraFeedback publishes its ratings as text
        with contextlib.suppress(ValueError):
            value = None if value == "N/A" else float(value)
    return read_number(value, record.location, here.path_of(names[-1]))


def read_score_of_pair(value: Any, location: str, field: str) -> float | None:
    """Read the score of one side of a pair. A value that is not finite becomes NaN, not an error.

    Column stores write NaN for missing values, and the labels may make the score superfluous. Code that needs the score
    rejects NaN.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return math.nan
    return read_number(value, location, field)


def no_reward_field(reward_field: RewardField, own: str, location: str) -> None:
    """Reject a reward field for pairs, whose reward fields have fixed names."""
    if reward_field is not None:
        names = [reward_field] if isinstance(reward_field, str) else reward_field
        raise UserError(
            f"{location}: reward field {', '.join(map(repr, names))} cannot be used for pairs, whose rewards are "
            f"{own}. Leave data.reward_field unset."
        )
