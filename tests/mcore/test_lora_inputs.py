"""Where a norm is fused with the linear layer behind it, a LoRA adapter reads what the linear layer reads."""

from __future__ import annotations

import importlib

import pytest

from ..engines import BRIDGE, ENGINE, NEMO
from ..megatron_ranks import init_megatron, run_ranks

WRAPPERS = {NEMO: "nemo.collections.llm.peft.lora", BRIDGE: "megatron.bridge.peft.lora_layers"}


def _adapter_and_linear_inputs() -> tuple[float, float]:
    """Largest differences of the adapter's input from the normed and from the raw hidden state."""
    import torch
    from megatron.core.transformer import TransformerConfig

    from nemo_rao.mcore.adapters import feed_normed_inputs
    from nemo_rao.mcore.norms import LayerNormColumnParallelLinear

    init_megatron()
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, normalization="RMSNorm", add_bias_linear=False
    )
    linear = LayerNormColumnParallelLinear(
        16, 24, config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False
    )
    with torch.no_grad():
        linear.layer_norm_weight.uniform_(0.5, 2.0)
    adapter = torch.nn.Linear(16, 24, bias=False)
    wrapper = importlib.import_module(WRAPPERS[ENGINE]).LoRALinear
    seen = []
    adapter.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wrapped = torch.nn.ModuleList([wrapper(linear, adapter)])
    feed_normed_inputs(wrapped)

    hidden = 3 * torch.randn(5, 2, 16)
    output, _ = wrapped[0](hidden)
    scale = hidden.pow(2).mean(-1, keepdim=True).add(config.layernorm_epsilon).rsqrt()
    normed = hidden * scale * linear.layer_norm_weight
    expected = normed @ linear.weight.T + adapter(normed)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    return float((seen[0] - normed).abs().max()), float((seen[0] - hidden).abs().max())


@pytest.mark.skipif(ENGINE is None, reason="the wrapper of a linear layer is an engine's")
def test_an_adapter_reads_the_normed_hidden_state() -> None:
    from_normed, from_raw = run_ranks(_adapter_and_linear_inputs, num_ranks=1)[0]
    assert from_normed < 1e-5 < 0.1 < from_raw
