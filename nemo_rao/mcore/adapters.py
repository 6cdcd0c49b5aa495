"""Low-rank adapters in a Megatron GPT model: eligible layers, initialization, storage in checkpoints.

An adapter adds ``alpha / dim * B A x`` to a linear layer's output; ``A`` is its ``linear_in``, ``[dim, in]``, and ``B``
its ``linear_out``, ``[out, dim]``. The wrapper of the linear layer holds it as ``to_wrap``, and these as ``adapter``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from torch import nn

from nemo_rao.mcore.norms import LayerNormColumnParallelLinear


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of a model chunk's linear layers: attention, feed-forward and output, but not experts.

    Names contain the layer's number in the whole model, as in ``decoder.layers.3.mlp.linear_fc1``; the module's name in
    the chunk contains its number on this pipeline stage.
    """
    for layer in model.decoder.layers:
        for part, parent in (("self_attention", layer.self_attention), ("mlp", layer.mlp)):
            for name, module in parent.named_children():
                if name.startswith("linear_"):
                    yield f"decoder.layers.{layer.layer_number - 1}.{part}.{name}", module
    if model.post_process:
        yield "output_layer", model.output_layer


@torch.no_grad()
def draw_start(adapter: Any, name: str, seed: int) -> None:
    """Initialize ``A`` from (seed, name): the same whole matrix under any TP, PP and DP. ``B`` is 0.

    ``A`` is normal, with Xavier's variance ``2 / (in + dim)`` for the whole matrix.
    """
    weight = adapter.linear_in.weight
    if weight.is_meta:
        return
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    axis = 1 if isinstance(adapter.linear_in, RowParallelLinear) else 0
    shape = list(weight.shape)
    shape[axis] *= ranks
    number = int.from_bytes(hashlib.sha256(f"{seed}|{name}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    whole = torch.randn(shape, generator=generator) * math.sqrt(2 / sum(shape))
    weight.copy_(whole.chunk(ranks, axis)[parallel_state.get_tensor_model_parallel_rank()])
    adapter.linear_out.weight.zero_()


def store_by_layer(adapter: Any, number: int) -> None:
    """Store an adapter of layer ``number`` as a separate tensor in checkpoints.

    Megatron stores a weight of all layers as one tensor, ``[layers, ...]``, which cannot have gaps.
    """
    original = adapter.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        if not sharded_offsets:  # every layer is stored separately anyway
            return original(prefix, sharded_offsets, metadata)
        state = original(prefix, (), metadata)
        start, local, rest = _split_at_layer(prefix)
        for tensor in state.values():
            # Megatron drops `local`, the layer's number on this stage, from the stored name.
            tensor.key = f"{start}{local}{number}.{rest}{tensor.key.removeprefix(prefix)}"
        return state

    adapter.sharded_state_dict = sharded_state_dict


def _split_at_layer(prefix: str) -> tuple[str, str, str]:
    """Split ``module.decoder.layers.1.mlp.`` into (``module.decoder.layers.``, ``1.``, ``mlp.``)."""
    start, layers, rest = prefix.partition("layers.")
    local, dot, rest = rest.partition(".")
    return start + layers, local + dot, rest


def store_as_vocabulary(adapter: Any) -> None:
    """Make the output layer's adapter loadable under another TP, to a multiple of which its rows are padded."""
    original = adapter.linear_out.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        state = original(prefix, sharded_offsets, metadata)
        state[f"{prefix}weight"].allow_shape_mismatch = True
        return state

    adapter.linear_out.sharded_state_dict = sharded_state_dict


def show_weight(wrapper: Any) -> None:
    """Expose a wrapped output layer's weight as ``weight``, which the model reads with tied embeddings."""
    vars(wrapper)["weight"] = wrapper.to_wrap.weight  # not registered a second time


def let_embeddings_need_gradients(model: Any) -> None:
    """Make the input of the first recomputed layers require a gradient if all weights below them are frozen.

    A recomputed layer is one function to autograd, whose output requires a gradient only if its input does. Without
    this, no adapter of the first pipeline stage would be trained.
    """
    if model.pre_process:
        model.embedding.register_forward_hook(_need_gradient)


def _need_gradient(embedding: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def feed_normed_inputs(model: nn.Module) -> None:
    """Let adapters see the linear layer's input if this project's layers fuse the norm in front of it.

    Engines request the normalized input of Transformer Engine's fused layers; this requests it of ours.
    """
    for module in model.modules():
        wrapped = getattr(module, "to_wrap", None)
        if isinstance(wrapped, LayerNormColumnParallelLinear):
            wrapped.return_layernorm_output = True
