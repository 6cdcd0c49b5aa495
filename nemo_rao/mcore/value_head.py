"""V(x): a linear head on the policy's last hidden state of a prompt, on the last pipeline stage.

The head sees the hidden state at the position that predicts the response's first token, after the final norm: all of
the prompt and nothing of the response. **Choice** It reads a detached state: the value loss trains the head alone, and
the policy's weights follow the policy loss alone. It starts at V = 0. Every tensor-parallel rank holds all of it, since
it is one row; it counts once in gradient norms and checkpoints. No policy weight: fingerprints leave it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_rao.batch import MicroBatch

VALUE_HEAD = "value_head"  # its name in the model, in checkpoints, and in the optimizer's parameter groups


class ValueHead(nn.Module):
    """One number for each row of a micro-batch.

    Args:
        hidden_size: of the model.
        dtype: of the weights; the product is computed in fp32.

    Attributes:
        stored: the checkpoint that is being read has the head; where not, it keeps the values that it has.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=_device()))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=_device()))
        self.stored = True
        self._sequence_parallel = sequence_parallel
        self._hidden: Tensor | None = None

    def watch(self, output_layer: nn.Module) -> None:
        """Read what enters the output layer, ``[T, R, H]`` (``[T/TP, R, H]`` with sequence parallelism)."""
        output_layer.register_forward_pre_hook(self._read)

    def _read(self, output_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._hidden = inputs[0].detach()

    def forward(self, batch: MicroBatch) -> Tensor:
        """``[R]`` fp32 values of the forward pass just run on ``batch``; the same on all tensor-parallel ranks."""
        assert self._hidden is not None, "no forward pass was run"
        hidden, self._hidden = self._hidden, None
        position = batch.response_mask.int().argmax(-1)  # predicts the response's first token
        rows = torch.arange(position.shape[0], device=position.device)
        if self._sequence_parallel:
            length, rank = hidden.shape[0], parallel_state.get_tensor_model_parallel_rank()
            inside = position // length == rank
            state = torch.where(inside[:, None], hidden[position % length, rows], 0)
            torch.distributed.all_reduce(state, group=parallel_state.get_tensor_model_parallel_group())
        else:
            state = hidden[position, rows]
        return nn.functional.linear(state.float(), self.weight.float(), self.bias.float())[:, 0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's modules have it; empty where the checkpoint to be read has no head."""
        if not self.stored:
            return {}
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *arguments)


def add_value_head(model: Any) -> None:
    """Give a Megatron GPT model chunk its head, where it is the last pipeline stage's."""
    if not model.post_process:
        return
    config = model.config
    head = ValueHead(config.hidden_size, config.params_dtype, config.sequence_parallel)
    head.watch(model.output_layer)
    setattr(model, VALUE_HEAD, head)


def value_heads(model: nn.Module) -> Iterator[ValueHead]:
    """The heads of a model or a wrapper of one: one on the last pipeline stage, none elsewhere."""
    return (module for module in model.modules() if isinstance(module, ValueHead))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
