"""Low-rank adapters in a Megatron GPT model: which layers can have one, how they start, how checkpoints hold them.

An adapter adds ``alpha / dim * B A x`` to a linear layer's output; ``A`` is its ``linear_in``, ``[dim, in]``, and ``B``
its ``linear_out``, ``[out, dim]``. Whatever wraps the linear layer has it as ``to_wrap``, and these as ``adapter``.
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
    """(name, layer) of the linear layers of a model chunk: of attention, feed-forward and output; not of experts.

    Names have the layer's number in the whole model, as in ``decoder.layers.3.mlp.linear_fc1``; the module's own name
    has its number on this pipeline stage.
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
    """Draw the start of ``A`` from (seed, name): the same whole matrix under any TP, PP and DP. ``B`` starts at 0.

    Normal, with Xavier's variance ``2 / (in + dim)`` of the whole matrix.
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
    """Give an adapter of layer ``number`` a place of its own in checkpoints.

    Megatron stores a weight of all layers as one tensor, ``[layers, ...]``, which cannot have gaps.
    """
    original = adapter.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        if not sharded_offsets:  # every layer has its own place anyhow
            return original(prefix, sharded_offsets, metadata)
        state = original(prefix, (), metadata)
        start, local, rest = _split_at_layer(prefix)
        for tensor in state.values():
            # Megatron drops `local`, the layer's number on this stage, from the name that is stored.
            tensor.key = f"{start}{local}{number}.{rest}{tensor.key.removeprefix(prefix)}"
        return state

    adapter.sharded_state_dict = sharded_state_dict


def _split_at_layer(prefix: str) -> tuple[str, str, str]:
    """``module.decoder.layers.1.mlp.`` -> (``module.decoder.layers.``, ``1.``, ``mlp.``)."""
    start, layers, rest = prefix.partition("layers.")
    local, dot, rest = rest.partition(".")
    return start + layers, local + dot, rest


def store_as_vocabulary(adapter: Any) -> None:
    """Let the adapter of the output layer be read under another TP: its rows are padded to a multiple of it."""
    original = adapter.linear_out.sharded_state_dict

    def sharded_state_dict(prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> Any:
        state = original(prefix, sharded_offsets, metadata)
        state[f"{prefix}weight"].allow_shape_mismatch = True
        return state

    adapter.linear_out.sharded_state_dict = sharded_state_dict


def show_weight(wrapper: Any) -> None:
    """Let a wrapped output layer's weight be found where it was: with tied embeddings the model asks for it."""
    vars(wrapper)["weight"] = wrapper.to_wrap.weight  # not registered a second time


def let_embeddings_need_gradients(model: Any) -> None:
    """Let the first of several recomputed layers have a gradient where all weights below it are frozen.

    A recomputed layer is one function to autograd, whose output needs a gradient only if its input does: without this,
    no adapter of the first pipeline stage would be trained.
    """
    if model.pre_process:
        model.embedding.register_forward_hook(_need_gradient)


def _need_gradient(embedding: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def feed_normed_inputs(model: nn.Module) -> None:
    """Let adapters see the linear layer's input where this project's layers fuse the norm in front of it.

    Engines ask Transformer Engine's fused layers for their normed input; ours are asked here.
    """
    for module in model.modules():
        wrapped = getattr(module, "to_wrap", None)
        if isinstance(wrapped, LayerNormColumnParallelLinear):
            wrapped.return_layernorm_output = True
