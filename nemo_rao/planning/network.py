"""Sizes of a GPT, dense or mixture of experts, on which parameters, activations and FLOPs depend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_rao.errors import UserError


@dataclass(frozen=True)
class Network:
    """A decoder in Megatron's terms.

    Attributes:
        layers: transformer layers.
        hidden, ffn: widths of the residual stream and of the feed-forward layers, or of each expert.
        experts, chosen: experts per layer and per token; 0 in a dense model.
        heads, groups, head: attention heads, key/value heads, width of one head.
        tokens: vocabulary size of the tokenizer, or embedding rows if the recipe sets them.
        divisible_by: the vocabulary is padded to a multiple of it times the tensor-parallel ranks, unless ``None``.
        tied: one matrix for input and output embeddings.
        gated: the feed-forward layers have a gate (SwiGLU).
        norm_bias: norms are LayerNorms.
        linear_bias, qkv_bias: all linear layers have biases; only those of queries, keys and values.
        qk_norm: queries and keys are normalized.
        positions: learned position embeddings; 0 for rotary ones.
        dropout: whether the residual stream has dropout.
        embedding_is_layer, loss_is_layer: counted as a layer when layers are distributed over pipeline stages.
    """

    layers: int
    hidden: int
    ffn: int
    experts: int
    chosen: int
    heads: int
    groups: int
    head: int
    tokens: int
    divisible_by: int | None
    tied: bool
    gated: bool
    norm_bias: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    positions: int
    dropout: bool
    embedding_is_layer: bool
    loss_is_layer: bool

    @property
    def dealt_layers(self) -> int:
        """Number of layers that are distributed evenly over pipeline stages."""
        return self.layers + self.embedding_is_layer + self.loss_is_layer

    @property
    def query(self) -> int:
        """Width of all queries."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Width of all keys, which is that of all values."""
        return self.groups * self.head

    @property
    def fc1(self) -> int:
        """Outputs of the first feed-forward layer, gate included."""
        return self.ffn * (2 if self.gated else 1)

    def vocabulary(self, tensor: int) -> int:
        """Rows of the embedding over all ``tensor`` ranks, padding included."""
        multiple = 1 if self.divisible_by is None else self.divisible_by * tensor
        return -(-self.tokens // multiple) * multiple


# Fields of Megatron's config that set the number of layers of each stage freely.
_LAYOUTS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


def network_of(fields: Mapping[str, Any], *, kind: str, num_tokens: int | None, seq_length: int) -> Network:
    """Return the network of a config's fields, as Megatron completes them.

    Args:
        fields: see :func:`nemo_rao.config.architecture.architecture_fields`.
        kind: the key that names its family, for messages.
        num_tokens: vocabulary size of the tokenizer; unused if ``vocab_size`` is set.
        seq_length: number of learned position embeddings, if the network has them.

    Raises:
        UserError: a size is missing, or the planner does not support this kind of network.
    """
    for name in ("multi_latent_attention", "mtp_num_layers"):
        if fields.get(name):
            raise UserError(f"{kind}: {name} is set, which the planner does not support.")
    for name in _LAYOUTS:
        if fields.get(name):
            raise UserError(
                f"model.arch.extra.{name}: is not supported by the planner. Remove it, or set "
                "account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split."
            )

    def whole(name: str, default: int | None = None) -> int:
        value = fields.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise UserError(f"model.arch.{name}: {kind} does not define it. Set it.")
        return value

    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    preset = fields.get("vocab_size")
    if preset is None and num_tokens is None:
        raise UserError(
            "data.tokenizer: the size of its vocabulary is not known here. Give the directory of a tokenizer with "
            "tokenizer.json, or set model.arch.extra.vocab_size."
        )
    experts, ffn = fields.get("num_moe_experts") or 0, whole("ffn_hidden_size", 4 * hidden)
    rotary = fields.get("position_embedding_type") == "rope"
    return Network(
        layers=whole("num_layers"),
        hidden=hidden,
        ffn=whole("moe_ffn_hidden_size", ffn) if experts else ffn,
        experts=experts,
        chosen=whole("moe_router_topk") if experts else 0,
        heads=heads,
        groups=whole("num_query_groups", heads),
        head=whole("kv_channels", hidden // heads),
        tokens=preset if preset is not None else num_tokens or 0,
        divisible_by=None if preset is not None else whole("make_vocab_size_divisible_by"),
        tied=bool(fields.get("share_embeddings_and_output_weights")),
        gated=bool(fields.get("gated_linear_unit")),
        norm_bias=fields.get("normalization") == "LayerNorm",
        linear_bias=bool(fields.get("add_bias_linear")),
        qkv_bias=bool(fields.get("add_bias_linear") or fields.get("add_qkv_bias")),
        qk_norm=bool(fields.get("qk_layernorm")),
        positions=0 if rotary else seq_length,
        dropout=bool(fields.get("hidden_dropout")),
        embedding_is_layer=bool(fields.get("account_for_embedding_in_pipeline_split")),
        loss_is_layer=bool(fields.get("account_for_loss_in_pipeline_split")),
    )


def linear_widths(network: Network) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of a layer's linear layers, and of the parts of fused ones."""
    hidden, query, key = network.hidden, network.query, network.key
    half = network.fc1 // 2
    return {
        "linear_qkv": (hidden, query + 2 * key),
        "linear_proj": (query, hidden),
        "linear_fc1": (hidden, network.fc1),
        "linear_fc2": (network.ffn, hidden),
        "linear_q": (hidden, query),
        "linear_k": (hidden, key),
        "linear_v": (hidden, key),
        "linear_fc1_gate": (hidden, half),
        "linear_fc1_up": (hidden, half),
    }
