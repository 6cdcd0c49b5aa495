"""Model families that can be converted: the contents of their config.json, and the engines that convert them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_rao.config.engine_choice import BRIDGE, NEMO
from nemo_rao.config.families import FAMILIES as NETWORKS
from nemo_rao.config.families import Family as Network


@dataclass(frozen=True)
class Family:
    """A model family that can be converted, and the peculiarities of its config.json.

    Attributes:
        architecture: its class in transformers.
        network: the common properties of its models, in Megatron's terms.
        nemo_model: its class in ``nemo.collections.llm``; ``None``: only Megatron-Bridge converts it.
        reads: keys that determine its network, in addition to those of Llama.
        fixed: key -> the only values that can be converted; extends or overrides those of all families.
        unused: keys that its network does not read.
        has_windows: whether ``sliding_window`` is read.
    """

    architecture: str
    network: Network
    nemo_model: str | None = None
    reads: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    has_windows: bool = False

    @property
    def model_type(self) -> str:
        """Its name in config.json."""
        return self.network.model_type

    @property
    def qkv_bias(self) -> bool:
        return bool(self.network.fields["add_qkv_bias"])

    @property
    def qk_norm(self) -> bool:
        return bool(self.network.fields["qk_layernorm"])

    @property
    def period(self) -> int:
        """Every ``period``-th layer is global, the others attend to ``sliding_window`` tokens; 1: all layers do so if
        it is set; 0: there is no window.
        """
        return (self.network.fields["window_attn_skip_freq"] or 1) if self.has_windows else 0

    @property
    def rope_type(self) -> str | None:
        """The only scaling of rotary embeddings that it supports."""
        if self.network.scales_rope:
            return "llama3"
        return "yarn" if self.network.fields["position_embedding_type"] == "yarn" else None


def _yarn(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` of a network with YaRN; Megatron-Bridge assumes these values."""
    return {
        "rope_type": "yarn",
        "factor": fields["yarn_rotary_scaling_factor"],
        "original_max_position_embeddings": fields["yarn_original_max_position_embeddings"],
        "beta_fast": fields["yarn_beta_fast"],
        "beta_slow": fields["yarn_beta_slow"],
        "truncate": fields["yarn_correction_range_round_to_int"],
    }


_EXPERTS = ("num_local_experts", "num_experts_per_tok")
# These networks have a window only with use_sliding_window, which is rejected.
_UNUSED_WINDOW = ("sliding_window", "max_window_layers")
_GEMMA3, _GPT_OSS = NETWORKS["gemma3"].fields, NETWORKS["gpt_oss"].fields

FAMILIES = (
    Family("LlamaForCausalLM", NETWORKS["llama"], "LlamaModel"),
    Family("MistralForCausalLM", NETWORKS["mistral"], "MistralModel", has_windows=True),
    Family("Qwen2ForCausalLM", NETWORKS["qwen2"], "Qwen2Model", unused=_UNUSED_WINDOW),
    Family("Qwen3ForCausalLM", NETWORKS["qwen3"], "Qwen3Model", unused=_UNUSED_WINDOW),
    Family(
        "Qwen3MoeForCausalLM",
        NETWORKS["qwen3_moe"],
        reads=("num_experts", *_EXPERTS, "moe_intermediate_size", "norm_topk_prob"),
        fixed={"decoder_sparse_step": (1,), "mlp_only_layers": (None, [])},
        unused=_UNUSED_WINDOW,
    ),
    Family(
        "MixtralForCausalLM",
        NETWORKS["mixtral"],
        reads=_EXPERTS,
        fixed={"router_jitter_noise": (None, 0)},
        has_windows=True,
    ),
    Family(
        "Gemma3ForCausalLM",
        NETWORKS["gemma3"],
        reads=("query_pre_attn_scalar", "rope_local_base_freq"),
        fixed={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "sliding_window_pattern": (None, _GEMMA3["window_attn_skip_freq"]),
            "_sliding_window_pattern": (None, _GEMMA3["window_attn_skip_freq"]),
        },
        has_windows=True,
    ),
    Family(
        "GptOssForCausalLM",
        NETWORKS["gpt_oss"],
        reads=_EXPERTS,
        fixed={
            "attention_bias": (True,),
            "swiglu_limit": (None, _GPT_OSS["activation_func_clamp_value"]),
            "rope_scaling": (_yarn(_GPT_OSS),),
            "tie_word_embeddings": (None, False),
        },
        unused=("experts_per_token", "initial_context_length"),  # redundant with other keys
        has_windows=True,
    ),
)


def families_of(engine: str) -> tuple[Family, ...]:
    """Families that an engine converts."""
    assert engine in (NEMO, BRIDGE), engine
    return tuple(family for family in FAMILIES if engine == BRIDGE or family.nemo_model is not None)


def names_of(engine: str) -> str:
    """Architectures that an engine converts, for messages."""
    return ", ".join(family.architecture for family in families_of(engine))
