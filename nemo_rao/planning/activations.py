"""Activations that a micro-batch keeps for its backward pass on one rank, tensor by tensor.

Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models) count them for GPT-3's layer.
Here they are counted for a layer with grouped queries, a gate and rotary positions, whose attention never holds T x T
weights. Legend: ``n`` tokens of the micro-batch on this context-parallel rank; ``s`` of them in norms and the residual
stream (n/TP under sequence parallelism); ``b`` bytes per number; TP-divided widths ``q, k, f``; hidden size ``h``.

    norm            its input and output, a statistic
    attention       rotated queries and keys; qkv before rotation, which includes values; output; log-sum-exp
    feed-forward    output of fc1, input of fc2
    experts         the same for routed tokens, and the input of fc1, with a copy of a token for each of its experts;
                    tokens are assumed to be spread evenly over ranks

This holds for Transformer Engine's fused layers. On a CPU, PyTorch's layers keep two fp32 copies instead of a norm's
input, the second one normalized, as well as sines and cosines, and the activation and the other half of a gate.
"""

from __future__ import annotations

from nemo_rao.config.lora_targets import fused
from nemo_rao.planning.network import linear_widths
from nemo_rao.planning.setting import COLUMN_PARALLEL, Lora, Setting

FP32 = 4
INT64 = 8


def layer_items(setting: Setting, adapted: frozenset[str] | None = None) -> dict[str, int]:
    """Return the bytes that one layer keeps without recomputation, by tensor.

    Args:
        adapted: its linear layers, or parts of them, that have adapters; ``None``: those of the first layer.
    """
    if adapted is None:
        adapted = frozenset() if setting.lora is None else setting.lora.adapted(0)
    network, tensor, b = setting.network, setting.tensor, setting.param_bytes
    n, s = setting.micro_batch_tokens, stream_tokens(setting)
    q, k = network.query // tensor, network.key // tensor
    fused = setting.transformer_engine
    items = {
        "norm before attention": norm_bytes(setting),
        "input of linear_qkv": s * network.hidden * b * _keeps_input(setting, "linear_qkv", adapted),
        "queries, keys and values": n * (q + 2 * k) * b,
        "rotated queries and keys": 0 if network.positions else n * (q + k) * b,
        # Sine and cosine of each position, for queries and for keys; fused kernels recompute them.
        "sines and cosines": 0 if network.positions or fused else 4 * setting.sequence * network.head * b,
        "attention's output": n * q * b,
        "log-sum-exp": n * (network.heads // tensor) * FP32,
        "norm before feed-forward": norm_bytes(setting),
    }
    if network.qk_norm:
        items["normed queries and keys"] = n * (q + k) * (b if fused else 2 * FP32)
    items |= _expert_items(setting) if network.experts else _dense_items(setting, adapted)
    if network.dropout:
        items["dropout masks"] = 2 * s * network.hidden
    if setting.lora is not None:
        items["adapters"] = _adapter_bytes(setting, setting.lora, adapted)
    return items


def _keeps_input(setting: Setting, name: str, adapted: frozenset[str]) -> bool:
    """Whether a linear layer's input is kept. With frozen weights, only an adapter that reads it directly keeps it."""
    if setting.lora is None:
        return True
    gathered = setting.sequence_parallel and name in COLUMN_PARALLEL
    return name in map(fused, adapted) and not gathered and not setting.lora.dropout


def _dense_items(setting: Setting, adapted: frozenset[str]) -> dict[str, int]:
    network, n, b = setting.network, setting.micro_batch_tokens, setting.param_bytes
    f, fc1 = network.ffn // setting.tensor, network.fc1 // setting.tensor
    items = {
        "input of linear_fc1": stream_tokens(setting)
        * network.hidden
        * b
        * _keeps_input(setting, "linear_fc1", adapted),
        "output of linear_fc1": n * fc1 * b,
        "input of linear_fc2": n * f * b * _keeps_input(setting, "linear_fc2", adapted),
    }
    if network.gated and not setting.transformer_engine:
        items["activation and the other half"] = 2 * n * f * b
    return items


def _expert_items(setting: Setting) -> dict[str, int]:
    network, s, b = setting.network, stream_tokens(setting), setting.param_bytes
    t, f, fc1 = routed_tokens(setting), network.ffn // setting.of_expert, network.fc1 // setting.of_expert
    items = {
        "input of the router": s * network.hidden * b,
        "the router's weights of experts": 2 * s * network.experts * FP32,
        "tokens at their experts": t * network.hidden * b,
        "output of linear_fc1": t * fc1 * b,
        "input of linear_fc2": t * f * b,
        "positions of tokens": 2 * s * network.chosen * INT64,
    }
    if not setting.transformer_engine:
        items["activation, the other half and their product"] = (3 if network.gated else 1) * t * f * b
    return items


def routed_tokens(setting: Setting) -> int:
    """Tokens that a rank's experts compute, counted once per expert, with all ranks equally loaded."""
    return stream_tokens(setting) * setting.network.chosen * setting.of_expert


def _adapter_bytes(setting: Setting, lora: Lora, adapted: frozenset[str]) -> int:
    """Bytes between an adapter's two products; its copy of an input that is gathered or dropped out; the factor of a
    DoRA magnitude."""
    widths, found = linear_widths(setting.network), 0
    for name in adapted:
        gathered = fused(name) in COLUMN_PARALLEL
        inputs, outputs = widths[name]
        found += adapter_bytes(setting, lora, inputs if gathered else inputs // setting.tensor, gathered=gathered)
        if lora.scheme == "dora":
            tokens = setting.micro_batch_tokens if gathered else stream_tokens(setting)
            found += tokens * outputs // (setting.tensor if gathered else 1) * setting.param_bytes
    return found


def adapter_bytes(setting: Setting, lora: Lora, width: int, *, gathered: bool) -> int:
    """Bytes of one adapter with ``width`` input columns per rank; ``gathered``: its sequence is split over ranks."""
    n, b = setting.micro_batch_tokens, setting.param_bytes
    gathered = gathered and setting.sequence_parallel
    found = n * lora.dim * b
    if gathered or lora.dropout:
        found += n * width * b
    if lora.dropout:  # the mask: one byte per number, or on a CPU one number
        dropped = stream_tokens(setting) if gathered and not setting.transformer_engine else n
        found += dropped * width * (1 if setting.transformer_engine else b)
    return found


def norm_bytes(setting: Setting) -> int:
    """Bytes of a norm's input, or of fp32 copies of it, and its statistic."""
    s, hidden = stream_tokens(setting), setting.network.hidden
    if setting.transformer_engine:
        return s * (hidden * setting.param_bytes + FP32)
    copies = 2 if setting.lora is None else 1  # the normalized copy is for the gradient of the norm's weight
    return s * (copies * hidden * FP32 + FP32)


def stream_tokens(setting: Setting) -> int:
    """Number of tokens whose residual stream a rank holds."""
    return setting.micro_batch_tokens // (setting.tensor if setting.sequence_parallel else 1)


def stored_layer(setting: Setting, adapted: frozenset[str] | None = None) -> int:
    """Bytes of a layer that is not fully recomputed. See :func:`layer_items`."""
    items = layer_items(setting, adapted)
    # Selective recomputation recomputes attention: its inputs are kept, and its output as the next layer's input.
    if setting.recompute_granularity == "selective":
        items["log-sum-exp"] = 0
    return sum(items.values())


def recomputed_layers(setting: Setting, stage: int) -> int:
    """Number of layers of a stage that are fully recomputed."""
    return sum(_recomputed_of_chunk(setting, stage, chunk) for chunk in range(setting.virtual))


def _recomputed_of_chunk(setting: Setting, stage: int, chunk: int) -> int:
    layers = setting.layers_of_chunk(stage, chunk)
    if setting.recompute_granularity != "full":
        return 0
    return min(setting.recompute_num_layers, layers) if setting.recompute_method == "block" else layers


def stored_layers(setting: Setting, stage: int) -> int:
    """Bytes that a stage's layers keep of one micro-batch between its forward and its backward pass."""
    # The input of each recomputed unit is kept; a unit is a layer, or several with the uniform method.
    unit = setting.recompute_num_layers if setting.recompute_method == "uniform" else 1
    again = [_recomputed_of_chunk(setting, stage, chunk) for chunk in range(setting.virtual)]
    units = sum(-(-layers // unit) for layers in again)
    inputs = units * stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    layers = max(1, setting.layers_of_stage(stage))
    all_stored = sum(number * stored_layer(setting, adapted) for adapted, number in setting.adapted(stage).items())
    return inputs + all_stored * (layers - sum(again)) // layers


def stored_ends(setting: Setting, stage: int) -> int:
    """Bytes outside of layers: token ids and rotary angles, the final norm."""
    found = 0
    if stage == 0:
        found += setting.micro_batch_tokens * 8
    if setting.recompute_granularity == "full" and not setting.network.positions:
        found += setting.sequence * setting.network.head * FP32
    if stage == setting.pipeline - 1:
        found += norm_bytes(setting)
    return found


def recomputed_unit(setting: Setting, stage: int) -> int:
    """Bytes that are recomputed for the backward pass of one unit of layers, whose input was kept."""
    again = max(_recomputed_of_chunk(setting, stage, chunk) for chunk in range(setting.virtual))
    if not again:
        return 0
    layers = min(setting.recompute_num_layers, again) if setting.recompute_method == "uniform" else 1
    return layers * sum(layer_items(setting).values())


def layer_gradients(setting: Setting) -> int:
    """Bytes of a layer's largest gradients in its backward pass: those of fc1's output and fc2's input."""
    network = setting.network
    tokens, ranks = setting.micro_batch_tokens, setting.tensor
    if network.experts:
        tokens, ranks = routed_tokens(setting), setting.of_expert
    return tokens * (network.fc1 + network.ffn) // ranks * setting.param_bytes


def forward_layer(setting: Setting) -> int:
    """Peak bytes of a layer that keeps nothing: the residual stream, a feed-forward part and its input."""
    n, hidden, b = setting.micro_batch_tokens, setting.network.hidden, setting.param_bytes
    return (stream_tokens(setting) + n) * hidden * b + layer_gradients(setting)
