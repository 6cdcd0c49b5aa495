"""A GPT built with megatron-core only, in the way of the engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class GPT(TransformerConfig):
    """Megatron's config with what a whole model needs beside it."""

    vocab_size: int = 0
    make_vocab_size_divisible_by: int = 128
    seq_length: int = 64
    rotary_base: float = 10000.0
    share_embeddings_and_output_weights: bool = False
    transformer_layer_spec: Callable[..., Any] | None = None

    def build(self, vp_stage: int | None = None) -> GPTModel:
        """This rank's model chunk; process groups exist."""
        assert self.transformer_layer_spec is not None
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        return GPTModel(
            self,
            transformer_layer_spec=self.transformer_layer_spec(self, vp_stage=vp_stage),
            vocab_size=-(-self.vocab_size // multiple) * multiple,
            max_sequence_length=self.seq_length,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,  # type: ignore[arg-type]
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            vp_stage=vp_stage,
        )


LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
