"""Build Bridge's model provider from a recipe; it builds the network on each rank.

Bridge deprecates providers in favor of a config and a builder, which its releases before 0.6 do not have.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from nemo_rao.config.architecture import architecture_fields
from nemo_rao.config.experts import check_experts
from nemo_rao.config.families import FAMILIES
from nemo_rao.config.lora_targets import KEY, adapted, check_targets, fused, linear_layers, lora_targets
from nemo_rao.config.megatron_fields import (
    messages_between_stages,
    offload_fields,
    parallel_fields,
    recompute_fields,
)
from nemo_rao.config.precision_checks import fp8_simulation
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.bridge.families import in_bridges_terms, parts_of
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.mcore.activations import activation
from nemo_rao.mcore.finish import finish_chunk, finish_config
from nemo_rao.mcore.layer_spec import NO_PARTS
from nemo_rao.objectives.base import Needs
from nemo_rao.runtime.gpus import transformer_engine_is_used

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def provider(config: RunConfig) -> Any:
    """Return the provider of the recipe's network, split over ranks; its vocabulary is not padded yet.

    Raises:
        UserError: Megatron has no such field, or rejects the sizes.
    """
    keys = config.model
    family = keys.family
    kind, given = in_bridges_terms(family, architecture_fields(config))
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in keys.arch.extra:
        if name not in fields and name not in FAMILIES[keys.family].fields:
            raise UserError(
                f"model.arch.extra.{name}: Megatron's GPT has no such field{did_you_mean(name, fields, otherwise='.')}"
            )
    sizes = {name: value for name, value in given.items() if name in fields}
    if isinstance(named := sizes.get("activation_func"), str):
        sizes["activation_func"] = activation(named)
    memory = {**recompute_fields(config), **offload_fields(config)}
    made = kind(**{**sizes, **_split(config), **memory, "seq_length": keys.seq_length})
    parts = NO_PARTS if transformer_engine_is_used() else parts_of(made, f"model.family={family}")
    finish_config(
        made,
        fp8_simulation=fp8_simulation(config.precision),
        parts=parts,
        shared_prompts=config.data.prefix_sharing,
        packed=config.data.packing,
    )
    return made


def model_config(config: RunConfig) -> Any:
    """Return the provider completed by Megatron."""
    made = provider(config)
    complete = copy.copy(made)
    # Sizes are checked against the ranks by the recipe's checks, in terms of its keys.
    for name in ("tensor", "pipeline", "context", "expert"):
        size = "context_parallel_size" if name == "context" else f"{name}_model_parallel_size"
        setattr(complete, size, 1)
    complete.expert_tensor_parallel_size, complete.virtual_pipeline_model_parallel_size = 1, None
    complete.sequence_parallel = False
    try:
        complete.finalize()
    except (AssertionError, ValueError) as error:
        raise UserError(f"model.arch: Megatron rejects these sizes: {error}") from None
    check_experts(config, vars(complete))
    check_targets(config, num_layers=complete.num_layers, experts=bool(complete.num_moe_experts))
    if config.model.peft.scheme == "canonical_lora" and not complete.gated_linear_unit:
        names = linear_layers(complete.num_layers, experts=bool(complete.num_moe_experts), split=True)
        if any(fused(name).endswith("linear_fc1") for name in adapted(lora_targets(config), names)):
            raise UserError(f"{KEY}: linear_fc1 of this model has no gate to split. Set model.peft.scheme=lora.")
    return complete


def _split(config: RunConfig) -> Mapping[str, Any]:
    keys = config.model
    return {
        **parallel_fields(config),
        # Bridge's default is 1 if experts are split; recipes use Megatron's default.
        "expert_tensor_parallel_size": keys.expert_tensor_parallel_size or keys.tensor_model_parallel_size,
        "pipeline_dtype": DTYPES[config.precision.params],
        **messages_between_stages(config),
    }


def padded_vocab_size(made: Any, num_tokens: int) -> int:
    """Return the rows of a provider's embeddings.

    The recipe's vocabulary size if it is divisible by the tensor-parallel ranks, as in NeMo; else that or the
    tokenizer's, padded as Megatron does. Bridge itself only pads a tokenizer's size.
    """
    ranks = made.tensor_model_parallel_size
    if made.vocab_size and made.vocab_size % ranks == 0:
        return int(made.vocab_size)
    multiple = made.make_vocab_size_divisible_by * ranks
    return -(-(made.vocab_size or num_tokens) // multiple) * multiple


def finish_when_built(made: Any, config: RunConfig, needs: Needs) -> None:
    """Make a provider finish its chunks for an objective (:mod:`nemo_rao.mcore.finish`) before they are wrapped."""

    def finish(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            finish_chunk(
                chunk,
                needs,
                fused_log_probs=config.model.fused_log_probs,
                head_seed=config.trainer.seed,
                fp8_is_simulated=fp8_simulation(config.precision) is not None,
            )
        return chunks

    made.register_pre_wrap_hook(finish)
