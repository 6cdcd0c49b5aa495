"""Report keys resolved from the data, and targets far from the starting policy, before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from nemo_rao.batch import RewardSummary
from nemo_rao.config.derived import objective_config
from nemo_rao.config.recipe_text import shown
from nemo_rao.config.run_config import RunConfig
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import say

# Nats of the mean target log-ratio of a response: e^5 = 148 times as probable as under the reference, or 1/148.
FAR_TARGET = 5.0


def say_targets(config: RunConfig, resolved: Any, rewards: RewardSummary) -> None:
    """Report each resolved key, and warn if the mean target log-ratio is far from 0.

    Args:
        resolved: the objective's keys, with values resolved from the data.
        rewards: summary of the training rewards.
    """
    for line in (*_resolved_keys(config, resolved), *_far_target(config, resolved, rewards)):
        say(line)


def _resolved_keys(config: RunConfig, resolved: Any) -> Iterator[str]:
    given = objective_config(config)
    for field in dataclasses.fields(given):
        before, after = getattr(given, field.name), getattr(resolved, field.name)
        if before != after:
            value = f"{after:.6g}" if isinstance(after, float) else after
            yield f"model.{given.block}.{field.name}={shown(before)}: {value}, from the training data"


def _far_target(config: RunConfig, resolved: Any, rewards: RewardSummary) -> Iterator[str]:
    target = registry.get(config.model.objective).mean_target(resolved, rewards)
    if target is not None and abs(target.nats) > FAR_TARGET:
        direction = "gain" if target.nats > 0 else "lose"
        yield (
            f"warning: the mean target log-ratio of the training data is {target.nats:.4g} nats per response, more "
            f"than {FAR_TARGET:g} from 0: each response must on average {direction} that much log-probability; "
            f"{target.remedy} centers it"
        )
