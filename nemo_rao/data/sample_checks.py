"""Checks of a row's tokens: they must fit into seq_length, and compared responses must differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from nemo_rao.batch import Row, Sample

PROMPT_TOO_LONG = "prompt alone as long as seq_length"
TOO_LONG = "prompt and response longer than seq_length"
SAME_TOKENS = "the responses that are compared have the same tokens"
EQUAL_TOKENS = "responses with the same tokens"
EQUAL_TOKENS_OTHER_REWARDS = "responses with the same tokens have different rewards or labels"


def why_dropped(row: Row, sample: Sample, seq_length: int, needs_pairs: bool) -> tuple[str, str] | None:
    """(reason, message about this row), or ``None`` to keep it."""
    if len(sample.prompt) >= seq_length:
        return (
            PROMPT_TOO_LONG,
            f"{row.location}: the prompt has {len(sample.prompt)} tokens, seq_length is {seq_length}",
        )
    for number, response in enumerate(sample.responses, start=1):
        if len(sample.prompt) + len(response) > seq_length:
            return TOO_LONG, (
                f"{row.location}: prompt and response {number} have {len(sample.prompt)} + {len(response)} tokens, "
                f"seq_length is {seq_length}"
            )
    if needs_pairs:
        compared = [pair for pair in _pairs(sample) if _differ(sample, *pair)]
        if compared and all(_equal(sample, *pair) for pair in compared):
            first, second = compared[0]
            return SAME_TOKENS, f"{row.location}: responses {first + 1} and {second + 1} have the same tokens"
    return None


def equal_tokens(sample: Sample) -> Iterator[str]:
    """Remarks on a sample in which several responses have the same tokens."""
    if len({response.tobytes() for response in sample.responses}) == len(sample.responses):
        return
    equal = [pair for pair in _pairs(sample) if _equal(sample, *pair)]
    if any(_differ(sample, *pair) for pair in equal):
        yield EQUAL_TOKENS_OTHER_REWARDS
    else:
        yield EQUAL_TOKENS


def _pairs(sample: Sample) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(len(sample.responses)), 2)


def _equal(sample: Sample, first: int, second: int) -> bool:
    return np.array_equal(sample.responses[first], sample.responses[second])


def _differ(sample: Sample, first: int, second: int) -> bool:
    """Whether one is better than the other, by the order or by rewards. NaN is a missing reward."""
    a, b = sample.rewards[first], sample.rewards[second]
    return sample.ranked or bool(a != b and not np.isnan(a) and not np.isnan(b))
