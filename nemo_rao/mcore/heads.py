"""Linear heads besides the output layer: numbers per row, from the last hidden state, on the last pipeline stage.

    value_head    V(x) of dro, at the position that predicts the response's first token, after the whole prompt and
                  none of the response. **Choice** It reads a detached state: the value loss trains only the head, and
                  only the policy loss trains the policy's weights. V(x, y_<t) of ppo, at every position that predicts a
                  token of the response, detached unless ``model.ppo.critic`` says otherwise. The value head of a critic
                  replaces the output layer, like a score head, and trains the whole model.
    score_head    a reward model's scores, at the response's end token, after all of prompt and response. It trains the
                  whole model, replaces the output layer, and has no bias, like the sequence classifiers of
                  `transformers`.

A run whose start has a head of this kind and size keeps it. A critic that starts from a reward model with one score
uses the score head as its value head, with a bias of 0. A new value head is initialized with 0, a new score head
randomly from the run's seed. Both read the state after the final norm. Every tensor-parallel rank holds the whole head,
which has only a few rows; it counts once in gradient norms and checkpoints. Fingerprints of the policy exclude it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from nemo_rao.batch import MicroBatch
from nemo_rao.mcore.context_parallel import summed
from nemo_rao.mcore.seeds import derived_seed
from nemo_rao.objectives.base import SCORE_HEAD, VALUE_HEAD

__all__ = ["HEADS", "SCORE_HEAD", "VALUE_HEAD", "LinearHead", "add_score_head", "add_value_head", "heads", "is_stored"]

HEADS = (VALUE_HEAD, SCORE_HEAD)
Position = Literal["prompt", "response", "tokens"]


class LinearHead(nn.Module):
    """Computes ``[R, outputs]`` numbers of a micro-batch's rows, or ``[R, longest, outputs]`` of their responses'
    tokens.

    Args:
        config: config of the model.
        name: one of :data:`HEADS`.
        num_outputs: numbers per row.
        position: where they are read: at the end of the prompt, at the end of the response, or at every position that
            predicts a token of the response.
        detached: no gradient flows into the model.
        bias: whether it has a bias.
        alone: it replaces the output layer.

    Attributes:
        name: name in the model.
        alone: as above.
        stored: name of the head in the checkpoint being loaded; ``None``: it has none, and this head keeps its values.
    """

    def __init__(
        self,
        config: Any,
        name: str,
        *,
        num_outputs: int,
        position: Position,
        detached: bool,
        bias: bool,
        alone: bool = False,
    ) -> None:
        super().__init__()
        like = {"dtype": config.params_dtype, "device": _device()}
        self.weight = nn.Parameter(torch.zeros(num_outputs, config.hidden_size, **like))
        self.bias = nn.Parameter(torch.zeros(num_outputs, **like)) if bias else None
        self.name, self.alone = name, alone
        self.stored: str | None = name
        self._sequence_parallel = config.sequence_parallel
        self._position = position
        self._detached = detached
        self._hidden: Tensor | None = None

    def watch(self, output_layer: nn.Module) -> None:
        """Capture the input of the output layer, ``[T, B, H]`` (``[T/TP, B, H]`` with sequence parallelism)."""
        output_layer.register_forward_pre_hook(self._read)

    def _read(self, output_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0].detach() if self._detached else inputs[0]

    def forward(self, batch: MicroBatch) -> Tensor:
        """Return ``[R, outputs]`` or ``[R, longest, outputs]`` fp32 for the last forward pass, which ran on ``batch``;
        0 after a response's last token.

        The same on all tensor- and context-parallel ranks.
        """
        assert self._hidden is not None, "a forward pass must have been run"
        hidden, self._hidden = self._hidden, None
        by_position = {"prompt": batch.boundary, "response": batch.end, "tokens": batch.response_positions}
        positions = by_position[self._position]
        present = positions >= 0  # a token on this context-parallel rank
        sequences, at = positions.clamp(min=0) // batch.tokens.shape[1], positions.clamp(min=0) % batch.tokens.shape[1]
        weight, bias = self.weight, self.bias
        if self._sequence_parallel:
            length, rank = hidden.shape[0], parallel_state.get_tensor_model_parallel_rank()
            present, at = present & (at // length == rank), at % length
            # Forward, the identity; backward, the sum of the ranks' parts, since each reads its own states.
            weight = copy_to_tensor_model_parallel_region(weight)
            bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
        numbers = nn.functional.linear(
            hidden[at, sequences].float(), weight.float(), None if bias is None else bias.float()
        )
        # A row contributes to the head's gradient, which is summed over ranks, only on the rank of its state.
        numbers = torch.where(present[..., None], numbers, 0)
        if self._sequence_parallel:
            # A sum over ranks; backward, each part gets the whole gradient, because every rank has the whole loss.
            numbers = reduce_from_tensor_model_parallel_region(numbers)
        return summed(numbers)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Like that of megatron-core's modules; empty if the checkpoint being loaded has no head."""
        if self.stored is None:
            return {}
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        if self.stored != self.name:
            del state["bias"]
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)
        for tensor in found.values():
            tensor.key = tensor.key.replace(self.name, self.stored)
        return found

    def look_for(self, checkpoint: Mapping[str, Sequence[int]]) -> None:
        """Find the head in a checkpoint and set ``stored``.

        Args:
            checkpoint: shapes of its tensors, by names that may have a prefix.
        """
        names = (self.name, SCORE_HEAD) if self.alone else (self.name,)
        self.stored = next((name for name in names if is_stored(name, self.weight.shape, checkpoint)), None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *arguments)


def add_value_head(model: Any, *, position: Position = "prompt", detached: bool = True, alone: bool = False) -> None:
    """Add a value head to a Megatron GPT model chunk on the last pipeline stage.

    Args:
        position, detached: see :class:`LinearHead`.
        alone: the output layer is skipped, see :func:`add_score_head`.
    """
    if not model.post_process:
        return
    head = LinearHead(
        model.config, VALUE_HEAD, num_outputs=1, position=position, detached=detached, bias=True, alone=alone
    )
    head.watch(model.output_layer)
    setattr(model, VALUE_HEAD, head)
    if alone:
        _skip_output_layer(model)


def add_score_head(model: Any, num_scores: int, *, seed: int) -> None:
    """Add a score head to a Megatron GPT model chunk on the last pipeline stage.

    The output layer is skipped: the model then returns its hidden states, ``[B, T, H]``. Its weight stays in the model
    and in checkpoints, unchanged.

    Args:
        num_scores: scores per response.
        seed: seed of the run, for the head's initialization.
    """
    if not model.post_process:
        return
    head = LinearHead(
        model.config, SCORE_HEAD, num_outputs=num_scores, position="response", detached=False, bias=False, alone=True
    )
    # With a separate generator: the same on every tensor-parallel rank, regardless of previous draws.
    generator = torch.Generator().manual_seed(derived_seed(SCORE_HEAD, seed))
    start = torch.randn(head.weight.shape, generator=generator) * 0.02
    head.weight.data.copy_(start)
    head.watch(model.output_layer)
    setattr(model, SCORE_HEAD, head)
    _skip_output_layer(model)


def _skip_output_layer(model: Any) -> None:
    output_layer = model.output_layer
    own = getattr(output_layer, "weight", None)
    shared_over_stages = own is not None and model.share_embeddings_and_output_weights
    if own is not None and not shared_over_stages:
        own.requires_grad_(False)

    def skip(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        # The copy of tied embeddings on the last stage must have a gradient, which Megatron adds to the first stage's.
        return (hidden + 0 * own.sum() if shared_over_stages and own is not None else hidden), None

    output_layer.forward = skip


def is_stored(name: str, shape: Sequence[int], stored: Mapping[str, Sequence[int]]) -> bool:
    """Whether a checkpoint has a head of this name and size.

    Args:
        name: one of :data:`HEADS`.
        shape: shape of its weight, ``[outputs, H]``.
        stored: shapes of the checkpoint's tensors, by names that may have a prefix.
    """
    return any(
        key.split(".")[-2:] == [name, "weight"] and tuple(found) == tuple(shape) for key, found in stored.items()
    )


def heads(model: nn.Module) -> Iterator[LinearHead]:
    """Yield the heads of a model or its wrapper; there are none except on the last pipeline stage."""
    return (module for module in model.modules() if isinstance(module, LinearHead))


def is_of_head(name: str) -> bool:
    """Whether a tensor with this name in the model or in a checkpoint belongs to a head."""
    return any(part in HEADS for part in name.split("."))


def train_heads(model: nn.Module) -> None:
    """Make the heads of a frozen model trainable, in addition to adapters."""
    for head in heads(model):
        head.requires_grad_(True)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
