"""Prompts in both the training and the validation data: metrics on them do not measure unseen prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_rao.data.store import PreferenceData


@dataclass(frozen=True)
class SharedPrompts:
    """Validation prompts whose tokens are those of a training prompt. ``str()`` gives one line for the user.

    Attributes:
        prompts: validation prompts that are shared, of ``validation_prompts``.
        first: place of the first of them, and of a training row with the same prompt.
    """

    prompts: int
    validation_prompts: int
    first: tuple[str, str]

    def __str__(self) -> str:
        place, training_place = self.first
        return (
            f"{self.prompts} of {self.validation_prompts} prompts are also prompts of the training data "
            f"(first: {place}, as in {training_place})"
        )


def shared_prompts(train: PreferenceData, validation: PreferenceData) -> SharedPrompts | None:
    """The prompts of both data sets; ``None`` where there are none. Reads 8 bytes a prompt."""
    found = np.flatnonzero(np.isin(validation.prompt_digests, train.prompt_digests))
    if not len(found):
        return None
    first = int(found[0])
    same = int(np.flatnonzero(train.prompt_digests == validation.prompt_digests[first])[0])
    return SharedPrompts(len(found), len(validation), (validation[first].place, train[same].place))
