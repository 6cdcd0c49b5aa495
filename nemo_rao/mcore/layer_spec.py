"""A transformer layer without Transformer Engine that keeps Transformer Engine's parameter names.

Megatron's own local spec stores its norms under other names than Transformer Engine's, and its norms refuse sequence
parallelism. This spec fuses each norm with the linear layer behind it, as Transformer Engine does, so that a
checkpoint written on a machine without it loads on one that has it, Hugging Face importers find every name, and the
norms' gradients are summed over tensor-parallel ranks under sequence parallelism.

In a mixture of experts the norm stands before the router, by itself (``pre_mlp_layernorm``), and experts are Megatron's
``SequentialMLP``: ``mlp.experts.local_experts.N``, as with Transformer Engine without grouped products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import Parameter

from nemo_rao.mcore.attention import SegmentAttention


def _norm_parameters(config: TransformerConfig, size: int) -> tuple[Parameter, Parameter | None]:
    """Weight and bias ``[size]`` of a norm; the bias is ``None`` for RMSNorm."""
    start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
    weight = Parameter(torch.full((size,), start, dtype=config.params_dtype))
    bias = Parameter(torch.zeros(size, dtype=config.params_dtype)) if config.normalization == "LayerNorm" else None
    for parameter in (weight, bias):
        if parameter is not None:
            # Each tensor-parallel rank norms its own part of the sequence: Megatron sums these gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight, bias


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension of ``[..., hidden]``."""
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "LayerNorm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, config.layernorm_epsilon)
    assert config.normalization == "RMSNorm", config.normalization
    return F.rms_norm(x, (x.shape[-1],), weight, config.layernorm_epsilon)


class Norm(torch.nn.Module):
    """A norm by itself: the block's final one, those of queries and keys, and the one before a router.

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
    """A norm and the column-parallel linear layer behind it, under Transformer Engine's parameter names.

    ``return_layernorm_output`` makes the forward pass return ``((output, normed input), bias)``, which is what NeMo's
    LoRA wrapper looks for: the adapter's input is the linear layer's input, not the norm's.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)
        self.return_layernorm_output = False

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = _norm(hidden, self.layer_norm_weight, self.layer_norm_bias, self.config)
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed), bias) if self.return_layernorm_output else (output, bias)


def layer_spec_without_te(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
    """The decoder's spec for a machine without Transformer Engine: MHA or GQA, dense or with experts in every layer."""
    query_key_norm = Norm if config.qk_layernorm else IdentityOp
    experts = config.num_moe_experts is not None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=LayerNormColumnParallelLinear,
                    core_attention=SegmentAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm if experts else IdentityOp,
            mlp=_experts() if experts else _dense(),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage)
    block = TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
    return ModuleSpec(module=TransformerBlock, submodules=block)


def _dense() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=LayerNormColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def _experts() -> ModuleSpec:
    expert = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=expert))
    )
