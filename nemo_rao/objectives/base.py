"""What an objective is: a name, its keys, a pure loss function, and what it needs of the data."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_rao.batch import LossOutput, ObjectiveBatch
from nemo_rao.errors import UserError


def keep(config: Any, reward_mean: float | None) -> Any:
    """The ``resolve`` of objectives whose keys do not depend on the data."""
    return config


@dataclass(frozen=True)
class Objective:
    """One entry of :mod:`nemo_rao.objectives.registry`.

    Attributes:
        name: in the registry, and of the keys: ``model.<name>.<key>``.
        config_type: a frozen dataclass of keys that refuses wrong values when it is made.
        loss: ``(batch, config) -> LossOutput``. Pure. Its metrics have the same names for every batch. What it does
            not need may be missing from the batch: reference sums are ``None``, rewards NaN.
        needs_reference: of the batch, the reference policy's log-probabilities.
        needs_rewards: of every response, an explicit reward.
        needs_preference: of every prompt, that its responses can be compared: all have rewards, or their order is a
            preference.
        min_responses: of every prompt.
        needs_shared_first_token: all prompts begin with the same token t0, since the loss compares prompts'
            log-probabilities, which are known but for that of t0.
        resolve: ``(config, reward_mean) -> config`` with every key fixed that the data decides; to be called once
            before training. ``reward_mean`` is the training set's mean over prompts of the mean reward of a prompt's
            responses, ``None`` where rewards are missing; raises :class:`UserError` if it is missed.
    """

    name: str
    config_type: type
    loss: Callable[[ObjectiveBatch, Any], LossOutput]
    needs_reference: bool
    needs_rewards: bool = False
    needs_preference: bool = False
    min_responses: int = 1
    needs_shared_first_token: bool = False
    resolve: Callable[[Any, float | None], Any] = keep

    def make_config(self, keys: Mapping[str, Any]) -> Any:
        """A config with some keys set.

        Raises:
            UserError: a key that does not exist, a value that is not allowed.
        """
        known = [field.name for field in dataclasses.fields(self.config_type)]
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                remedy = f"did you mean {nearest[0]}?" if nearest else f"its keys are {', '.join(known)}"
                raise UserError(f"unknown key model.{self.name}.{key}; {remedy}")
        return self.config_type(**keys)
