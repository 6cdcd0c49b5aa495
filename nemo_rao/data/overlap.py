"""Prompts that are in both training and validation data: metrics on them do not measure unseen prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_rao.data.store import PreferenceData


@dataclass(frozen=True)
class SharedPrompts:
    """Validation prompts with the same tokens as a training prompt. ``str()`` gives one line for the user.

    Attributes:
        prompts: number of shared validation prompts, of ``validation_prompts``.
        first: location of the first of them, and of a training row with the same prompt.
    """

    prompts: int
    validation_prompts: int
    first: tuple[str, str]

    def __str__(self) -> str:
        location, training_location = self.first
        return (
            f"{self.prompts} of {self.validation_prompts} prompts are also prompts of the training data "
            f"(first: {location}, as in {training_location})"
        )


def shared_prompts(train: PreferenceData, validation: PreferenceData) -> SharedPrompts | None:
    """Prompts that both data sets contain; ``None`` if there are none. Reads 8 bytes per prompt."""
    found = np.flatnonzero(np.isin(validation.prompt_digests, train.prompt_digests))
    if not len(found):
        return None
    first = int(found[0])
    same = int(np.flatnonzero(train.prompt_digests == validation.prompt_digests[first])[0])
    return SharedPrompts(len(found), len(validation), (validation[first].location, train[same].location))
