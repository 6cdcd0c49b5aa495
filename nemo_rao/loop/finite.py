"""Stop a run whose loss or gradient norm is not finite, and report the rows and rewards of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from nemo_rao.batch import Sample
from nemo_rao.errors import RankFailure
from nemo_rao.loop.session import Hook, Session

NUM_SHOWN = 4  # rows of a step that a message names


class StopWhereNotFinite(Hook):
    """Ends the run after a step that is not finite, on all ranks, before its checkpoint is written.

    Must come after :class:`nemo_rao.loop.metrics.Metrics`, whose numbers are reduced over the global batch.

    Args:
        skips_steps: the run uses fp16. Then an overflow of gradients is expected: the optimizer skips the step and
            lowers the loss scale. The logged loss is not scaled.
    """

    def __init__(self, *, skips_steps: bool) -> None:
        self._checked = ("loss",) if skips_steps else ("loss", "grad_norm")

    def after_step(self, session: Session) -> None:
        numbers = session.reported()
        for name in self._checked:
            if name in numbers and not math.isfinite(value := numbers[name]):
                data = session.data
                rows = (data.train.data[index] for index in data.prompts_of_step(session.step - 1))
                raise RankFailure(not_finite(name, value, session.step, rows))


def not_finite(name: str, value: float, step: int, rows: Iterable[Sample]) -> str:
    """Describe the step in one line, with its rows, largest rewards first, and the remedies.

    Args:
        name: name of the metric.
        step: counted from 1, as in ``metrics.jsonl``.
        rows: rows of the step's global batch.
    """
    by_size = sorted(rows, key=_largest_reward, reverse=True)
    shown = [f"{row.location}{_reward_of(row)}" for row in by_size[:NUM_SHOWN]]
    more = f" and {len(by_size) - NUM_SHOWN} more" if len(by_size) > NUM_SHOWN else ""
    what = "gradient norm" if name == "grad_norm" else name
    return (
        f"{what} of step {step} is {value:g}. Rows of the step, largest rewards first: {', '.join(shown)}{more}. Check "
        "these rows, lower model.optim.lr, or scale the rewards (nemo-rao score --standardize global). No checkpoint "
        "of this step is kept."
    )


def _largest_reward(row: Sample) -> float:
    """Return the largest absolute reward; -1 if none is known."""
    rewards = np.abs(row.rewards[~np.isnan(row.rewards)])
    return float(rewards.max(initial=-1.0))


def _reward_of(row: Sample) -> str:
    largest = _largest_reward(row)
    return f" (|reward| up to {largest:.6g})" if largest >= 0 else ""
