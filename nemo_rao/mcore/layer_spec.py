"""A transformer layer without Transformer Engine that keeps Transformer Engine's parameter names.

Megatron's local spec stores its norms under other names than Transformer Engine's, and its norms reject sequence
parallelism. This spec fuses each norm with the following linear layer, as Transformer Engine does. So a checkpoint
written on a machine without it can be loaded on one that has it, Hugging Face importers find every name, and the norms'
gradients are summed over tensor-parallel ranks under sequence parallelism.

In a mixture of experts the norm before the router is separate (``pre_mlp_layernorm``), and experts are Megatron's
``SequentialMLP``: ``mlp.experts.local_experts.N``, as with Transformer Engine without grouped products.

Fields of Megatron's config describe most of a family: norms of queries and keys, windows in every or every n-th layer,
a softmax offset, biases, the router. :class:`Parts` describes the rest. A field that requires anything else is
rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

from nemo_rao.errors import UserError
from nemo_rao.mcore.attention import LocalLayers, SegmentAttention
from nemo_rao.mcore.norms import LayerNormColumnParallelLinear, Norm, RowParallelLinearLayerNorm


@dataclass(frozen=True)
class Parts:
    """Parts of a family's layers for which Megatron's config has no field. The default: none.

    Attributes:
        norms_behind: the outputs of attention and feed-forward are normalized before they are added to the residual.
        local_layers: layers with a window and separate rotary angles.
    """

    norms_behind: bool = False
    local_layers: LocalLayers | None = None


NO_PARTS = Parts()


class LocalAndGlobalSelfAttention(SelfAttention):
    """Self-attention in a model with rotary angles ``[2, T, ...]`` for local and for global layers."""

    def __init__(self, *arguments: Any, local_layers: LocalLayers, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._angles = 0 if local_layers.has(self.layer_number) else 1

    def forward(self, hidden_states: Tensor, *arguments: Any, rotary_pos_emb: Tensor, **keywords: Any) -> Any:
        """Like Megatron's, with the angles of this layer's kind."""
        return super().forward(hidden_states, *arguments, rotary_pos_emb=rotary_pos_emb[self._angles], **keywords)


def layer_spec_without_te(
    config: TransformerConfig, vp_stage: int | None = None, *, parts: Parts = NO_PARTS
) -> ModuleSpec:
    """Return the decoder's spec without Transformer Engine: MHA or GQA, dense or with experts in every layer.

    Raises:
        UserError: a field of ``config`` requires a feature that these layers lack.
    """
    _check(config)
    query_key_norm = Norm if config.qk_layernorm else IdentityOp
    row_parallel = RowParallelLinearLayerNorm if parts.norms_behind else RowParallelLinear
    local = {} if parts.local_layers is None else {"local_layers": parts.local_layers}
    experts = config.num_moe_experts is not None
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=LocalAndGlobalSelfAttention if local else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, **local},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=LayerNormColumnParallelLinear,
                    core_attention=ModuleSpec(module=SegmentAttention, params=local) if local else SegmentAttention,
                    linear_proj=row_parallel,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm if experts else IdentityOp,
            mlp=_experts() if experts else _dense(row_parallel),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage)
    block = TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)
    return ModuleSpec(module=TransformerBlock, submodules=block)


def _dense(row_parallel: type[RowParallelLinear]) -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=LayerNormColumnParallelLinear, linear_fc2=row_parallel)
    )


def _experts() -> ModuleSpec:
    expert = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=expert))
    )


# Field of Megatron's config -> (supported values, meaning of the others). A release may lack a field.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "multi_latent_attention": ((False,), "multi-latent attention"),
    "experimental_attention_variant": ((None,), "linear or sparse attention"),
    "attention_output_gate": ((False,), "gated attention"),
    "qk_l2_norm": ((None, False), "L2 norms of queries and keys"),
    "heterogeneous_block_specs": ((False,), "layers of different kinds"),
    "is_hybrid_model": ((False,), "state-space layers"),
    "mtp_num_layers": ((None, 0), "multi-token prediction"),
    "moe_shared_expert_intermediate_size": ((None, 0), "shared experts"),
    "moe_layer_freq": ((1,), "experts in some layers only"),
    "moe_latent_size": ((None,), "latent experts"),
    "normalization": (("RMSNorm", "LayerNorm"), "another norm"),
    "attn_logit_softcapping": ((None, 0, 0.0), "a soft cap of attention's logits"),
    "final_logit_softcapping": ((None, 0, 0.0), "a soft cap of the output's logits"),
}


def _check(config: TransformerConfig) -> None:
    fields = vars(config)
    for name, (values, meaning) in _REFUSED.items():
        value = fields.get(name, values[0])
        if name == "moe_layer_freq" and config.num_moe_experts is None:
            continue
        if isinstance(value, list) and len(set(value)) == 1:  # one value per layer
            value = value[0]
        if value not in values:
            raise UserError(
                f"model.arch: {name}={value} requires {meaning}, which needs Transformer Engine's layers and a GPU. "
                "Use another model here."
            )
