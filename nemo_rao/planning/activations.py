"""Activations that a micro-batch leaves for its backward pass, tensor by tensor, on one rank.

Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models) count them for GPT-3's layer;
here are those of a layer with grouped queries, a gate and rotary positions, and with attention that never holds T x T
weights. Legend: ``n`` tokens of the micro-batch, ``s`` of them where norms and the residual stream are (n/TP under
sequence parallelism), ``b`` bytes of a number, TP-divided widths ``q, k, f``, and hidden ``h``.

    norm            its input and output, a statistic
    attention       queries and keys after rotation; qkv before it, of which values are a part; output; log-sum-exp
    feed-forward    output of fc1, input of fc2

So with Transformer Engine's fused layers. PyTorch's own, on a CPU, keep in place of a norm's input two fp32 copies, the
second one normed, besides sines and cosines, and of a gate the activation and the other half.
"""

from __future__ import annotations

from nemo_rao.planning.parameters import is_target
from nemo_rao.planning.setting import Lora, Setting

FP32 = 4


def layer_items(setting: Setting) -> dict[str, int]:
    """Bytes of one layer without recomputation, by tensor."""
    network, tensor, b = setting.network, setting.tensor, setting.param_bytes
    n, s = setting.micro_batch_tokens, stream_tokens(setting)
    q, k, f, fc1 = (width // tensor for width in (network.query, network.key, network.ffn, network.fc1))
    fused = setting.transformer_engine
    items = {
        "norm before attention": norm_bytes(setting),
        "input of linear_qkv": s * network.hidden * b,
        "queries, keys and values": n * (q + 2 * k) * b,
        "rotated queries and keys": 0 if network.positions else n * (q + k) * b,
        # Sine and cosine, for queries and for keys, of each position; fused kernels compute them anew.
        "sines and cosines": 0 if network.positions or fused else 4 * setting.length * network.head * b,
        "attention's output": n * q * b,
        "log-sum-exp": n * (network.heads // tensor) * FP32,
        "norm before feed-forward": norm_bytes(setting),
        "input of linear_fc1": s * network.hidden * b,
        "output of linear_fc1": n * fc1 * b,
        "input of linear_fc2": n * f * b,
    }
    if network.qk_norm:
        items["normed queries and keys"] = n * (q + k) * (b if fused else 2 * FP32)
    if network.gated and not fused:
        items["activation and the other half"] = 2 * n * f * b
    if network.dropout:
        items["dropout masks"] = 2 * s * network.hidden
    if setting.lora is not None:
        items["adapters"] = _adapter_bytes(setting, setting.lora)
    return items


def _adapter_bytes(setting: Setting, lora: Lora) -> int:
    """Between an adapter's two products; its own gathered copy of an input whose sequence is split."""
    n, found = setting.micro_batch_tokens, 0
    for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        if is_target(name, lora):
            gathered = setting.sequence_parallel and name in ("linear_qkv", "linear_fc1")
            found += n * (lora.dim + (setting.network.hidden if gathered else 0)) * setting.param_bytes
    return found


def norm_bytes(setting: Setting) -> int:
    """A norm's input, or fp32 copies of it, and its statistic."""
    s, hidden = stream_tokens(setting), setting.network.hidden
    if setting.transformer_engine:
        return s * (hidden * setting.param_bytes + FP32)
    return s * (2 * hidden * FP32 + FP32)


def stream_tokens(setting: Setting) -> int:
    """Tokens whose residual stream a rank holds."""
    return setting.micro_batch_tokens // (setting.tensor if setting.sequence_parallel else 1)


def stored_layer(setting: Setting) -> int:
    """Bytes of a layer that is not recomputed whole."""
    items = layer_items(setting)
    if setting.recompute_granularity == "selective":  # attention alone: its inputs are kept, and its output is fc's
        items["log-sum-exp"] = 0
    return sum(items.values())


def recomputed_layers(setting: Setting) -> int:
    """Layers of a stage that are computed again, whole."""
    if setting.recompute_granularity != "full":
        return 0
    if setting.recompute_method == "block":
        return min(setting.recompute_num_layers, setting.layers_of_stage)
    return setting.layers_of_stage


def stored_layers(setting: Setting) -> int:
    """Bytes that a stage's layers keep of one micro-batch between its forward and its backward pass."""
    again = recomputed_layers(setting)
    # Of each recomputed unit its input is kept: a layer, or several under the uniform method.
    unit = setting.recompute_num_layers if setting.recompute_method == "uniform" else 1
    inputs = -(-again // unit) * stream_tokens(setting) * setting.network.hidden * setting.param_bytes
    return inputs + (setting.layers_of_stage - again) * stored_layer(setting)


def stored_ends(setting: Setting, stage: int) -> int:
    """Bytes outside layers: token numbers and rotary angles, the final norm."""
    found = 0
    if stage == 0:
        found += setting.micro_batch_tokens * 8
    if setting.recompute_granularity == "full" and not setting.network.positions:
        found += setting.length * setting.network.head * FP32
    if stage == setting.pipeline - 1:
        found += norm_bytes(setting)
    return found


def recomputed_unit(setting: Setting) -> int:
    """Bytes that stand again while one unit of layers goes through its backward pass; its input was kept."""
    again = recomputed_layers(setting)
    if not again:
        return 0
    layers = min(setting.recompute_num_layers, again) if setting.recompute_method == "uniform" else 1
    return layers * sum(layer_items(setting).values())


def layer_gradients(setting: Setting) -> int:
    """Bytes of a layer's largest gradients in its backward pass: of the output of fc1 and the input of fc2."""
    network = setting.network
    return setting.micro_batch_tokens * (network.fc1 + network.ffn) // setting.tensor * setting.param_bytes
