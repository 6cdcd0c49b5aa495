"""All parameters of a rank, in the order of the model's modules: exact, by name.

The names and shapes are megatron-core's; a tensor-parallel rank holds an equal part of each, whichever rank it is:

    embedding   [V/TP, H]           linear_qkv [(Q + 2 K)/TP, H]     linear_fc1 [F1/TP, H]
    norms       [H]                 linear_proj [H, Q/TP]            linear_fc2 [H, F/TP]
    router      [E, H]              of E/EP experts each             fc1, fc2, over the ranks that share an expert

Adapters follow the engines: ``linear_in`` and ``linear_out`` around a linear layer, whose weights are frozen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nemo_rao.planning.network import linear_widths
from nemo_rao.planning.setting import COLUMN_PARALLEL, Setting


@dataclass(frozen=True)
class Parameter:
    """A tensor of one rank.

    Attributes:
        name: name in the model.
        size: elements on this rank.
        trained: whether it has a gradient and optimizer state.
        shared_embedding: a tied embedding on the first or last of several stages, which has a separate bucket.
        expert: of an expert that is copied to fewer ranks than other weights, and so is in a separate buffer.
    """

    name: str
    size: int
    trained: bool
    shared_embedding: bool = False
    expert: bool = False


def stage_parameters(setting: Setting, stage: int) -> list[Parameter]:
    """List the parameters of a rank of this pipeline stage, chunk after chunk."""
    return [one for chunk in range(setting.virtual) for one in chunk_parameters(setting, stage, chunk)]


def chunk_parameters(setting: Setting, stage: int, chunk: int) -> list[Parameter]:
    """List the parameters of one of a rank's chunks of the model."""
    network, tensor = setting.network, setting.tensor
    first, last = stage == chunk == 0, (stage, chunk) == (setting.pipeline - 1, setting.virtual - 1)
    part = network.vocabulary(tensor) // tensor * network.hidden
    several = setting.pipeline > 1
    found: list[Parameter] = []

    def add(name: str, size: int, *, trained: bool = True, shared: bool = False, expert: bool = False) -> None:
        found.append(Parameter(name, size, trained and setting.lora is None, shared, expert))

    def add_linear(name: str, inputs: int, outputs: int, *, row: bool, bias: bool, norm: bool = False) -> None:
        """Add a linear layer, split over tensor-parallel ranks by columns or rows, with the norm fused into it."""
        base = f"{name}.to_wrap" if adapted(name) else name
        add(f"{base}.weight", inputs * outputs // tensor)
        if bias:
            add(f"{base}.bias", outputs if row else outputs // tensor)
        if norm:
            add_norm(f"{base}.layer_norm_", network.hidden)
        add_adapter(name, inputs, outputs)

    def adapted(name: str) -> bool:
        """Whether the layer of this name on this stage gets an adapter; targets count layers of the whole model."""
        return setting.lora is not None and setting.lora.adapts(in_whole_model(name))

    def in_whole_model(name: str) -> str:
        of_layer = re.match(r"decoder\.layers\.(\d+)(.*)", name)
        return f"decoder.layers.{before + int(of_layer[1])}{of_layer[2]}" if of_layer else name

    def add_adapter(name: str, inputs: int, outputs: int) -> None:
        lora = setting.lora
        if lora is None:
            return
        parts = lora.parts(in_whole_model(name))
        if parts and lora.scheme == "dora":
            size = outputs // (tensor if name.endswith(COLUMN_PARALLEL) else 1)
            found.append(Parameter(f"{name}.adapter.weight_magnitude", size, trained=True))
        for part in parts:
            own = f"{name}.adapter" + ("" if name.endswith(part) else f".adapter_{part.rpartition('_')[2]}")
            out = widths[part][1] if part in widths else outputs
            for matrix, width in (("linear_in", inputs), ("linear_out", out)):
                found.append(Parameter(f"{own}.{matrix}.weight", width * lora.dim // tensor, trained=True))

    def add_norm(prefix: str, width: int) -> None:
        add(f"{prefix}weight", width)
        if network.norm_bias:
            add(f"{prefix}bias", width)

    def add_experts(layer: str) -> None:
        ranks, apart = setting.of_expert, setting.expert > 1
        add_norm(f"{layer}.pre_mlp_layernorm.", network.hidden)
        add(f"{layer}.mlp.router.weight", network.experts * network.hidden)
        if bias:
            add(f"{layer}.mlp.router.bias", network.experts)
        for number in range(network.experts // setting.expert):
            expert = f"{layer}.mlp.experts.local_experts.{number}"
            add(f"{expert}.linear_fc1.weight", network.hidden * network.fc1 // ranks, expert=apart)
            if bias:
                add(f"{expert}.linear_fc1.bias", network.fc1 // ranks, expert=apart)
            add(f"{expert}.linear_fc2.weight", network.ffn * network.hidden // ranks, expert=apart)
            if bias:
                add(f"{expert}.linear_fc2.bias", network.hidden, expert=apart)

    if first:
        add("embedding.word_embeddings.weight", part, shared=network.tied and several)
        if network.positions:
            add("embedding.position_embeddings.weight", network.positions * network.hidden)
    qkv, bias = network.query + 2 * network.key, network.linear_bias
    widths = linear_widths(network)
    before = setting.layers_before(stage, chunk)
    for number in range(setting.layers_of_chunk(stage, chunk)):
        layer = f"decoder.layers.{number}"
        attention, mlp = f"{layer}.self_attention", f"{layer}.mlp"
        add_linear(f"{attention}.linear_proj", network.query, network.hidden, row=True, bias=bias)
        add_linear(f"{attention}.linear_qkv", network.hidden, qkv, row=False, bias=network.qkv_bias, norm=True)
        if network.qk_norm:
            for which in "qk":
                add_norm(f"{attention}.{which}_layernorm.", network.head)
        if network.experts:
            add_experts(layer)
            continue
        add_linear(f"{mlp}.linear_fc1", network.hidden, network.fc1, row=False, bias=bias, norm=True)
        add_linear(f"{mlp}.linear_fc2", network.ffn, network.hidden, row=True, bias=bias)
    if last:
        add_norm("decoder.final_layernorm.", network.hidden)
        if not network.tied or several:
            # A reward model skips its output layer, which then has no gradient unless it is the embedding's copy.
            trained = not setting.scores or network.tied
            name = "output_layer.to_wrap.weight" if adapted("output_layer") else "output_layer.weight"
            add(name, part, trained=trained, shared=network.tied)
        add_adapter("output_layer", network.hidden, network.vocabulary(tensor))
        if setting.value_head:
            for name, size in (("value_head.weight", network.hidden), ("value_head.bias", 1)):
                found.append(Parameter(name, size, trained=True))  # with adapters too
        elif setting.scores:  # a critic also skips its output layer, and has a value head
            add("score_head.weight", setting.scores * network.hidden)
    return found


def model_parameters(setting: Setting) -> int:
    """Number of parameters of the whole model, without copies, adapters and padding of the vocabulary."""
    unpadded = replace(setting.network, divisible_by=None, embedding_is_layer=False, loss_is_layer=False)
    whole = replace(
        setting, network=unpadded, tensor=1, pipeline=1, virtual=1, context=1, expert=1, expert_tensor=1, lora=None
    )
    return sum(parameter.size for parameter in stage_parameters(whole, 0))
