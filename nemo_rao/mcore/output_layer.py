"""The output layer left out: its input and its weight go to the log-probabilities, and logits never exist.

Megatron's GPT model always calls its output layer. Where log-probabilities are fused with it
(:mod:`nemo_rao.ops.linear_log_probs`), the call passes by and what it was given is kept for the loss: the states after
the final norm, and the weight, which with tied embeddings is the embedding's, or the last stage's copy of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_KEPT = "fused_output"


class _Kept:
    """What the output layer was called with, until it is asked for."""

    def __init__(self, output_layer: Any) -> None:
        self.layer = output_layer
        self.call: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        self.call = hidden, self.layer.weight if weight is None else weight
        return hidden[:1], None  # the model turns it round and returns it; nobody reads it


def fuse_output_layer(model: Any) -> None:
    """Let a Megatron GPT model chunk's output layer pass by, where it is the last pipeline stage's."""
    if not model.post_process:
        return
    kept = _Kept(model.output_layer)
    model.output_layer.forward = kept.forward
    vars(model)[_KEPT] = kept  # no submodule: the layer is one already


def output_layer_input(model: Any) -> tuple[Tensor, Tensor] | None:
    """(hidden ``[T, B, H]``, weight ``[V/TP, H]``) of the forward pass just run; ``None`` where logits were computed.

    Hidden is ``[T/TP, B, H]`` with sequence parallelism.
    """
    kept: _Kept | None = vars(model).get(_KEPT)
    if kept is None:
        return None
    assert kept.call is not None, "no forward pass was run"
    call, kept.call = kept.call, None
    return call


def unfuse_adapted_output_layer(model: Any) -> None:
    """Compute logits after all where an adapter was put around the output layer: it adds its own part to them."""
    kept: _Kept | None = vars(model).get(_KEPT)
    if kept is not None and model.output_layer is not kept.layer:
        del kept.layer.forward
        del vars(model)[_KEPT]
