"""Prepare an engine's GPT for training with an objective: its config before it is built, its chunks after."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_rao.errors import UserError
from nemo_rao.mcore.flex_attention import share_prompts
from nemo_rao.mcore.fp8_simulation import Fp8Simulation, keep_scales_up_to_date, layer_spec_with_simulated_fp8
from nemo_rao.mcore.heads import add_score_head, add_value_head
from nemo_rao.mcore.layer_spec import NO_PARTS, Parts, layer_spec_without_te
from nemo_rao.mcore.loss import configure_loss_scaling
from nemo_rao.mcore.output_layer import fuse_output_layer
from nemo_rao.objectives.base import Needs
from nemo_rao.runtime.gpus import transformer_engine_is_used


def finish_config(
    config: TransformerConfig,
    *,
    fp8_simulation: Mapping[str, Any] | None,
    parts: Parts = NO_PARTS,
    shared_prompts: bool = False,
    packed: bool = False,
) -> None:
    """Set a model config's loss scaling and, where Transformer Engine's is not suitable, its layer spec.

    Args:
        config: an engine's config, with a ``transformer_layer_spec`` that it calls to build the model.
        fp8_simulation: fields of :class:`nemo_rao.mcore.fp8_simulation.Fp8Simulation`; ``None``: no simulation.
        parts: parts of the family's layers that ``config`` does not describe; used without Transformer Engine.
        shared_prompts, packed: the layout of micro-batches, see :func:`nemo_rao.data.collate.collate`.

    Raises:
        UserError: the simulation does not support these layers, or Transformer Engine's cannot share prompts.
    """
    configure_loss_scaling(config)
    if fp8_simulation is not None:
        assert not transformer_engine_is_used(), "Transformer Engine's layers cast by themselves"
        if parts != NO_PARTS:
            raise UserError("precision.fp8_simulation: this family's layers cannot be simulated. Set it to false.")
        simulation = Fp8Simulation(**fp8_simulation)
        config.transformer_layer_spec = functools.partial(layer_spec_with_simulated_fp8, simulation=simulation)
    elif not transformer_engine_is_used():
        plain = parts == Parts()
        config.transformer_layer_spec = (
            layer_spec_without_te if plain else functools.partial(layer_spec_without_te, parts=parts)
        )
    elif shared_prompts:
        share_prompts(config, packed=packed)


def finish_chunk(
    chunk: nn.Module, needs: Needs, *, fused_log_probs: bool, head_seed: int, fp8_is_simulated: bool
) -> None:
    """Add the head that an objective needs to a new model chunk; only affects the last pipeline stage.

    Args:
        chunk: a Megatron GPT, possibly wrapped.
        needs: needs of the objective.
        fused_log_probs: never hold the logits, see :mod:`nemo_rao.mcore.output_layer`.
        head_seed: seed of a score head's initialization.
        fp8_is_simulated: its layers have scales to update.
    """
    if fp8_is_simulated:
        keep_scales_up_to_date(chunk)
    if needs.values is not None:
        add_value_head(chunk, position=needs.values, detached=not needs.value_gradient, alone=needs.values_alone)
    if needs.scores:
        add_score_head(chunk, needs.scores, seed=head_seed)
    elif fused_log_probs and not needs.values_alone:
        fuse_output_layer(chunk)
