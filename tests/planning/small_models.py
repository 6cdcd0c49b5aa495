"""Memory and FLOPs of a small model's forward and backward pass, measured on one of two local ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rao.config.run_config import RunConfig

from ..engine_models import gpt, megatron_configs
from ..mcore.tiny import Layout, enter

aten = torch.ops.aten


def measure(configs: Sequence[RunConfig], batch: tuple[int, int], tokens: int) -> list[dict[str, int]]:
    """For each config, of one micro-batch ``[rows, length]`` on this rank, through the output's log-probabilities:

    kept: bytes of storages that autograd saves in the forward pass, each once, without parameters.
    again: bytes of those that stand at the most at once of what is saved in the backward pass.
    forward, backward: FLOPs of matrix products and attention.
    """
    return [_measure(config, batch, tokens) for config in configs]


def _measure(config: RunConfig, batch: tuple[int, int], tokens: int) -> dict[str, int]:
    keys = config.model
    enter(
        Layout(
            tensor=keys.tensor_model_parallel_size,
            sequence_parallel=keys.sequence_parallel,
            expert=keys.expert_model_parallel_size,
        )
    )
    model = _model(config, tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, tokens, batch, generator=generator)
    positions = torch.arange(batch[1]).expand(batch)

    kept, again = Saved(model), Saved(model)
    with _counter() as counter, torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        output = model(input_ids=ids, position_ids=positions, attention_mask=None)
        loss = _log_probs(model, output, ids, tokens).sum()
    forward = counter.get_total_flops()
    saved = kept.bytes
    with _counter() as counter, torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        loss.backward()
    return {"kept": saved, "again": again.most, "forward": forward, "backward": counter.get_total_flops()}


def _model(config: RunConfig, tokens: int) -> Any:
    from nemo_rao.mcore.output_layer import unfuse_adapted_output_layer

    made, *_ = megatron_configs(config)
    model = gpt(config, made, tokens, fused=config.model.fused_log_probs).to(made.params_dtype).train()
    unfuse_adapted_output_layer(model)
    return model


def _log_probs(model: Any, output: Tensor, ids: Tensor, tokens: int) -> Tensor:
    from megatron.core import parallel_state

    from nemo_rao.mcore.output_layer import output_layer_input
    from nemo_rao.ops.linear_log_probs import linear_vocab_parallel_log_probs
    from nemo_rao.ops.vocab_parallel import vocab_parallel_log_probs

    group, everywhere = parallel_state.get_tensor_model_parallel_group(), torch.ones_like(ids, dtype=torch.bool)
    if (fused := output_layer_input(model)) is None:
        return vocab_parallel_log_probs(output, ids, vocab_size=tokens, group=group, mask=everywhere)
    return linear_vocab_parallel_log_probs(
        *fused,
        ids.t(),
        vocab_size=tokens,
        group=group,
        mask=everywhere.t(),
        sequence_parallel=model.config.sequence_parallel,
    )


class Saved:
    """Storages that autograd saves, each counted once while it is needed; parameters are not counted."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._users: dict[int, int] = {}
        self.bytes = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        return _Handle(self, tensor)

    def unpack(self, handle: Any) -> Tensor:
        return handle.tensor

    def taken(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._parameters:
            return
        before = self._users.get(address, 0)
        self._users[address] = before + change
        if before == 0 or before + change == 0:
            self.bytes += change * storage.nbytes()
            self.most = max(self.most, self.bytes)


class _Handle:
    """A saved tensor, for as long as autograd holds it."""

    def __init__(self, owner: Saved, tensor: Tensor) -> None:
        self._owner, self.tensor = owner, tensor
        owner.taken(tensor, 1)

    def __del__(self) -> None:
        self._owner.taken(self.tensor, -1)


def _attention(products: int) -> Callable[..., int]:
    def count(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
        rows, heads, length, width = query
        return products * 2 * rows * heads * length * key[-2] * width

    return count


def _backward_attention(gradient: Any, query: Any, key: Any, *rest: Any, **_: Any) -> int:
    return _attention(5)(query, key)  # the scores anew, and two products' gradients on both sides


def _counter() -> Any:
    """PyTorch's counter, which has no formula for its own CPU kernel of attention, nor for sums in place."""
    from torch.utils.flop_counter import FlopCounterMode

    mapping = {
        aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
        aten._scaled_dot_product_flash_attention_for_cpu: _attention(2),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_attention,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
