"""Draw one token from each row of logits, with random numbers that depend only on what is sampled.

A token is drawn by inverting the cumulative distribution, in vocabulary order, at one uniform number. How rows are
batched, and on how many devices they are computed, affects only rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, stream: Sequence[int], count: int) -> np.ndarray:
    """Return ``[count]`` float64 in [0, 1), the draws of one response; their prefixes do not depend on ``count``."""
    return np.random.default_rng([seed, *stream]).random(count)


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: int, top_p: float) -> Tensor:
    """Draw one token per row.

    Args:
        logits: ``[R, V]``; entries of -inf are never drawn.
        uniform: ``[R]`` float64 in [0, 1).
        temperature: ``[R, 1]``; 0: the row's largest logit.
        top_k: draw only from the k largest; 0: all.
        top_p: draw only from the largest ones that together reach this probability, at least one.

    Returns:
        ``[R]`` int64.
    """
    scaled = logits.float() / torch.where(temperature > 0, temperature, 1.0)
    if 0 < top_k < scaled.shape[1]:
        smallest = scaled.topk(top_k, dim=1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    probabilities = scaled.softmax(dim=1).double()
    if top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        before = ordered.cumsum(dim=1) - ordered
        probabilities = probabilities.masked_fill((before >= top_p).gather(1, order.argsort(dim=1)), 0.0)
    cumulative = probabilities.cumsum(dim=1)
    total = cumulative[:, -1:]
    # Below the total even if the product is rounded up, so that no token without probability is drawn.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return torch.where(temperature[:, 0] > 0, drawn, logits.argmax(dim=1))
