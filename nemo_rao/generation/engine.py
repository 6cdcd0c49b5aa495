"""What turns prompts' tokens into responses' tokens: the interface of the engines that sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Request:
    """One response that is wanted.

    Attributes:
        tokens: ``[prompt tokens]`` int32.
        stream: numbers that name the response (prompt, response, attempt); with the seed they decide what is drawn.
        max_new_tokens: at least 1.
        temperature: 0 for the most probable tokens.
    """

    tokens: np.ndarray
    stream: tuple[int, ...]
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Continuation:
    """What the policy said.

    Attributes:
        tokens: without the token that ends it.
        cut: it was not ended, but had reached its largest length.
    """

    tokens: list[int]
    cut: bool


class Engine(Protocol):
    """Generates; its ``name`` is part of what decides the responses."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Continuation]:
        """The requests' continuations, in order, each a function of seed, stream and tokens."""


def first_stop(tokens: Sequence[int], stop: Collection[int]) -> Continuation:
    """What stands before the first token that ends a response."""
    for at, token in enumerate(tokens):
        if token in stop:
            return Continuation(list(tokens[:at]), cut=False)
    return Continuation(list(tokens), cut=True)
