"""Memory of the log-probabilities on the last stage, without logits or from whole logits.

Without logits (:mod:`nemo_rao.ops.linear_log_probs`): the hidden states, gathered if the sequence is split, their
gradient in fp32, a few dozen bytes per token, and the workspace of the blocks. With whole logits: the logits in the
weights' dtype, in the model's layout and in the one it returns, then their gradient, and a chunk in fp32. An adapter on
the output layer needs whole logits, because it adds to them. A forward-only pass has no gradients.
"""

from __future__ import annotations

from nemo_rao.ops.workspace import CHUNK_BYTES, cell_and_side
from nemo_rao.planning.activations import FP32, adapter_bytes, stream_tokens
from nemo_rao.planning.setting import Setting

_STATISTICS = 48  # bytes per token: positions, targets, sums


def log_prob_bytes(setting: Setting) -> int:
    """Peak bytes between the last stage's forward and backward pass, including what is kept for the latter."""
    network, n, b = setting.network, setting.micro_batch_tokens, setting.param_bytes
    hidden = stream_tokens(setting) * network.hidden * b
    if setting.scores:
        return hidden
    if not setting.holds_logits:
        gathered = n * network.hidden * b if setting.sequence_parallel else 0
        # The tokens' gradient in fp32, and the returned one: fp32 before it is scattered over the ranks.
        gradients = n * network.hidden * (FP32 + (FP32 if setting.sequence_parallel else b))
        return hidden + gathered + gradients + n * _STATISTICS + _blocks(setting)
    logits, lora, held = whole_logits(setting), setting.lora, 2
    if lora is not None and lora.adapts("output_layer"):
        hidden += adapter_bytes(setting, lora, network.hidden, gathered=True)
        held += 1
    return hidden + held * logits + min(CHUNK_BYTES, logits * FP32 // b) + n * _STATISTICS


def forward_log_prob_bytes(setting: Setting) -> int:
    """Peak bytes of the last stage's log-probabilities in a forward-only pass."""
    network, n, b = setting.network, setting.micro_batch_tokens, setting.param_bytes
    hidden = stream_tokens(setting) * network.hidden * b
    if setting.scores:
        return hidden
    if setting.holds_logits:
        logits = whole_logits(setting)
        return hidden + 2 * logits + min(CHUNK_BYTES, logits * FP32 // b) + n * _STATISTICS
    gathered = n * network.hidden * b if setting.sequence_parallel else 0
    return hidden + gathered + n * _STATISTICS + _blocks(setting)


def _blocks(setting: Setting) -> int:
    """Bytes of the blocks: the workspace, or those of all tokens and columns if that is less."""
    columns = setting.network.vocabulary(setting.tensor) // setting.tensor
    cell, side = cell_and_side(setting.network.hidden, FP32, setting.param_bytes)
    n = setting.micro_batch_tokens
    return min(setting.workspace_bytes, n * columns * cell + (n + columns) * side)


def whole_logits(setting: Setting) -> int:
    """Bytes of a micro-batch's logits on one rank."""
    vocabulary = setting.network.vocabulary(setting.tensor) // setting.tensor
    return setting.micro_batch_tokens * vocabulary * setting.param_bytes
