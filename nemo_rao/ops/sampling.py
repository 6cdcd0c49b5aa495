"""One token from each row of logits, by random numbers that depend on what is sampled and on nothing else.

A token is drawn by inverting the cumulative distribution, in the order of the vocabulary, at one uniform number. How
rows are put into batches, and on how many devices they are computed, change nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, stream: Sequence[int], count: int) -> np.ndarray:
    """``[count]`` float64 in [0, 1): the draws of one response, of which any beginning is the same for any count."""
    return np.random.default_rng([seed, *stream]).random(count)


def draw(logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: int, top_p: float) -> Tensor:
    """One token a row.

    Args:
        logits: ``[R, V]``, of which -inf is never drawn.
        uniform: ``[R]`` float64 in [0, 1).
        temperature: ``[R, 1]``; 0: the row's largest logit.
        top_k: only the k largest; 0: all.
        top_p: only the largest ones that together reach this probability, at least one.

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
    # Below the total even where the product is rounded up, so that no token without probability is found.
    wanted = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return torch.where(temperature[:, 0] > 0, drawn, logits.argmax(dim=1))
