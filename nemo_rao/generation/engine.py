"""What turns prompts' tokens into responses' tokens: the interface, and the choice between its implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from nemo_rao.errors import UserError
from nemo_rao.generation.settings import PolicySettings


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


def choose_engine(asked: str) -> str:
    """The name of the engine: vLLM where it can run, unless one is asked for.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        raise UserError("engine='vllm': vLLM is not installed; install it, or give --engine transformers")
    if asked != "auto":
        return asked
    if not installed:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.is_available() else "transformers"


def open_engine(
    name: str, folder: Path, settings: PolicySettings, stop: Collection[int], num_tokens: int, padding: int
) -> Engine:
    """Loads the policy's weights.

    Args:
        name: from :func:`choose_engine`.
        folder: a checked folder.
        settings: of sampling.
        stop: the tokens that end a response.
        num_tokens: of the tokenizer; a model may have more, which stand for nothing and are never drawn.
        padding: the token that fills batches.
    """
    if name == "vllm":
        from nemo_rao.generation.with_vllm import VllmEngine

        return VllmEngine(folder, settings, stop)
    from nemo_rao.generation.with_transformers import TransformersEngine

    return TransformersEngine(folder, settings, stop, num_tokens, padding)


def first_stop(tokens: Sequence[int], stop: Collection[int]) -> Continuation:
    """What stands before the first token that ends a response."""
    for at, token in enumerate(tokens):
        if token in stop:
            return Continuation(list(tokens[:at]), cut=False)
    return Continuation(list(tokens), cut=True)
