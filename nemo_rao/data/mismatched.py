"""Prompts paired with responses to other prompts, for objectives that compare with unrelated responses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nemo_rao.batch import Sample
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError


def mismatched(data: PreferenceData, *, seq_length: int, seed: int) -> PreferenceData:
    """Pair every prompt with a response to another one, to estimate the log-ratio of unrelated responses.

    The other prompt is the next one in a seeded random order, and the response is one of its responses at random: the
    result is a function of data and seed. **Choice** A response that is too long for its new prompt is truncated, since
    no reward belongs to it.

    Raises:
        UserError: there is only one prompt.
    """
    if len(data) < 2:
        raise UserError(
            f"{data[0].location}: the only prompt left, but the objective compares with responses to other prompts. "
            "Add data."
        )
    generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, len(data)])))
    order = generator.permutation(len(data))
    draws = generator.random_sample(len(data))
    others = np.empty(len(data), dtype=np.int64)
    others[order] = np.roll(order, -1)

    def samples() -> Iterator[Sample]:
        for index in range(len(data)):
            sample, other = data[index], data[int(others[index])]
            response = other.responses[int(draws[index] * len(other.responses))][: seq_length - len(sample.prompt)]
            yield replace(
                sample,
                responses=(response,),
                rewards=np.full(1, np.nan),
                ranked=False,
                ensemble=np.zeros((1, 0)),
                reference_rewards=np.zeros(0),
                answers=None,
            )

    return PreferenceData(samples())
