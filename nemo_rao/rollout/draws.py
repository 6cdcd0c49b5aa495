"""One token from each row of logits, by random numbers that depend on what is sampled and on nothing else.

A token is drawn by inverting the cumulative distribution, in the order of the vocabulary, at one uniform number. That
number is a function of (seed, step, prompt, k, position): how rows are put into batches, what parallelism computes
them, and whether the run was interrupted, change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k: only so many of the most probable tokens; 0: all.
        top_p: of those, the fewest most probable tokens that hold this much probability; 1: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniforms(seed: int, step: int, prompt: int, k: int, number: int) -> np.ndarray:
    """``[number]`` float64 in [0, 1), for the positions of the k-th response to a prompt, from its first on."""
    # RandomState: its stream is frozen, see nemo_rao.data.order.
    generator = np.random.RandomState(np.random.Philox(np.random.SeedSequence([seed, step, prompt, k])))
    return generator.random_sample(number)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, *, vocab_size: int) -> Tensor:
    """``[B]`` int64 tokens.

    Args:
        logits: ``[B, V]``, of the whole vocabulary with its padding.
        uniform: ``[B]`` float64 in [0, 1).
        vocab_size: V without padding, which is never drawn.
    """
    logits = logits[:, :vocab_size].double()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = _kept(logits / sampling.temperature, sampling).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    threshold = (uniform.to(cumulative.device) * cumulative[:, -1])[:, None]
    # The first token whose cumulative probability is above: one of probability 0 is never that.
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    last = vocab_size - 1 - probabilities.flip(-1).gt(0).int().argmax(-1)  # where rounding leaves nothing above
    return torch.minimum(drawn, last)


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits, -inf for tokens that are not to be drawn. Of equal ones at the border, all stay or all go."""
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = torch.where(logits < least, -torch.inf, logits)
    if sampling.top_p < 1:
        ordered, _ = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        least = torch.where(before < sampling.top_p, ordered, torch.inf).amin(-1, keepdim=True)
        logits = torch.where(logits < least, -torch.inf, logits)
    return logits
