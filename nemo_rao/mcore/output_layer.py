"""Skipping of the output layer: its input and its weight go to the log-probabilities, and logits are never computed.

Megatron's GPT model always calls its output layer. If log-probabilities are fused with it
(:mod:`nemo_rao.ops.linear_log_probs`), the call is skipped and its arguments are kept for the loss: the states after
the final norm, and the weight, which with tied embeddings is the embedding's, or the last stage's copy of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KEPT = "fused_output"


class _Kept:
    """Arguments of the last call of the output layer, until they are read."""

    def __init__(self, output_layer: Any) -> None:
        self.layer = output_layer
        self.call: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        self.call = hidden, self.layer.weight if weight is None else weight
        return hidden[:1], None  # the model transposes and returns it; it is not used


def fuse_output_layer(model: Any) -> None:
    """Skip the output layer of a Megatron GPT model chunk on the last pipeline stage."""
    if not model.post_process:
        return
    kept = _Kept(model.output_layer)
    model.output_layer.forward = kept.forward
    vars(model)[_KEPT] = kept  # not as a submodule: the layer is one already


def output_layer_input(model: Any) -> tuple[Tensor, Tensor] | None:
    """Return (hidden ``[T, B, H]``, weight ``[V/TP, H]``) of the last forward pass; ``None`` if it computed logits.

    Hidden is ``[T/TP, B, H]`` with sequence parallelism.
    """
    kept: _Kept | None = vars(model).get(_KEPT)
    if kept is None:
        return None
    assert kept.call is not None, "a forward pass must have been run"
    call, kept.call = kept.call, None
    return call


def unfuse_adapted_output_layer(model: Any) -> None:
    """Do not skip an output layer with an adapter, which adds to the logits."""
    kept: _Kept | None = vars(model).get(_KEPT)
    if kept is not None and model.output_layer is not kept.layer:
        del kept.layer.forward
        del vars(model)[_KEPT]
