"""Norms, alone and fused with the following or preceding linear layer, with Transformer Engine's parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import Parameter


def _norm_parameters(config: TransformerConfig, size: int) -> tuple[Parameter, Parameter | None]:
    """Create weight and bias ``[size]`` of a norm; the bias is ``None`` for RMSNorm."""
    start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    weight = Parameter(torch.full((size,), start, dtype=config.params_dtype))
    bias = Parameter(torch.zeros(size, dtype=config.params_dtype)) if config.normalization == "LayerNorm" else None
    for parameter in (weight, bias):
        if parameter is not None:
            # Each tensor-parallel rank normalizes its part of the sequence: Megatron sums these gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight, bias


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """Apply RMSNorm or LayerNorm over the last dimension of ``[..., hidden]``."""
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "LayerNorm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, config.layernorm_epsilon)
    assert config.normalization == "RMSNorm", config.normalization
    return F.rms_norm(x, (x.shape[-1],), weight, config.layernorm_epsilon)


class Norm(torch.nn.Module):
    """A separate norm: the block's final one, those of queries and keys, and the one before a router.

    Parameters ``weight`` and ``bias``, ``[hidden]``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        assert eps == config.layernorm_epsilon, (eps, config.layernorm_epsilon)
        self.config = config
        self.weight, self.bias = _norm_parameters(config, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return _norm(hidden, self.weight, self.bias, self.config)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and the following column-parallel linear layer, with Transformer Engine's parameter names.

    ``return_layernorm_output`` makes the forward pass return ``((output, normalized input), bias)``, which NeMo's LoRA
    wrapper looks for: the adapter's input is the linear layer's input, not the norm's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)
        self.return_layernorm_output = False

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = _norm(hidden, self.layer_norm_weight, self.layer_norm_bias, self.config)
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed), bias) if self.return_layernorm_output else (output, bias)


class RowParallelLinearLayerNorm(RowParallelLinear):
    """A row-parallel linear layer and a norm of its output, ``post_layernorm``, as in Gemma 3's layers."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        assert not config.add_bias_linear, "the bias is added later, and would not be normalized"
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> Any:
        output, bias = super().forward(hidden)
        return self.post_layernorm(output), bias
