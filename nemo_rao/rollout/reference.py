"""Weights of the reference policy: kept in host memory during training, swapped in for a forward pass.

There is only one model on the device. Only the trained weights have a second copy, sharded as the model: all weights,
or just the adapters. Weights are swapped one tensor at a time, so the device never holds a second model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rao.mcore.forward import unwrapped
from nemo_rao.mcore.host_memory import on_host


class ReferenceWeights:
    """Copy of a model's current trained weights; see :func:`reference_weights`."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._kept = [(name, parameter, on_host(parameter)) for name, parameter in _trained(chunks)]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the reference weights inside the block; the model's own are restored bit for bit afterwards."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the kept ones."""
        for _, parameter, kept in self._kept:
            own = parameter.detach().clone()
            parameter.copy_(kept, non_blocking=True)
            kept.copy_(own)

    def without_adapters(self) -> ReferenceWeights:
        """Zero the kept adapters' output projections, so that they add nothing."""
        for name, _, kept in self._kept:
            if name.endswith(".linear_out.weight"):
                kept.zero_()
        return self


def reference_weights(
    chunks: Sequence[Any], *, adapters: bool, resumed: bool, load_start: Callable[[Sequence[Any]], None]
) -> ReferenceWeights:
    """Weights of the policy before its first step.

    Args:
        chunks: this rank's model chunks, with the weights that the run continues from.
        adapters: whether only adapters are trained.
        resumed: whether the run has already taken steps.
        load_start: loads the weights that the run started with into the chunks; a collective over all ranks.
    """
    kept = ReferenceWeights(chunks)
    if adapters:
        return kept.without_adapters()
    if resumed:
        load_start(chunks)
        kept.swap()
    return kept


def _trained(chunks: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for chunk in chunks:
        for name, parameter in unwrapped(chunk).named_parameters():
            if parameter.requires_grad:
                yield name, parameter
