"""Mixtures of experts: divisibility, and the Megatron options that suit objectives on whole responses.

A token's experts must not depend on the rest of the batch. Then neither does a response's log-probability, and the
reference log-probabilities are valid in every step. Load-balancing losses are left out
(:func:`nemo_rao.mcore.loss.configure_loss_scaling` explains why).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rao.config.architecture import network_key
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError

# Field of the config -> why it is refused if it is set.
_REFUSED = {
    "moe_expert_capacity_factor": "tokens would be dropped depending on the rest of the batch",
    "moe_input_jitter_eps": "routing would be random, in the reference pass too",
    "moe_shared_expert_intermediate_size": "shared experts are not supported",
}
_BALANCING = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type")


def check_experts(config: RunConfig, fields: Mapping[str, Any]) -> None:
    """Check that the network's experts can be trained and split as the recipe requests, or that it requests no split.

    Args:
        fields: the network's, see :func:`nemo_rao.config.architecture.architecture_fields`.

    Raises:
        UserError: on the first violated rule.
    """
    keys, experts = config.model, fields.get("num_moe_experts")
    parallel, each = keys.expert_model_parallel_size, keys.expert_tensor_parallel_size
    if not experts:
        for name, value, single in (("expert_model", parallel, 1), ("expert_tensor", each, None)):
            if value != single:
                raise UserError(
                    f"model.{name}_parallel_size={value}: {network_key(config)} has no experts; set it to "
                    f"{'null' if single is None else single}"
                )
        return
    if experts % parallel:
        raise UserError(
            f"model.arch.extra.num_moe_experts={experts} (of {network_key(config)}) is not divisible by "
            f"model.expert_model_parallel_size={parallel}; ranks split them evenly, so change one of them"
        )
    width = fields.get("moe_ffn_hidden_size") or fields.get("ffn_hidden_size") or 0
    ranks = each or keys.tensor_model_parallel_size
    if width % ranks:
        raise UserError(
            f"the experts' width, {width} (of {network_key(config)}), is not divisible by "
            f"model.{'expert_tensor' if each else 'tensor_model'}_parallel_size={ranks}; change one of them"
        )
    if keys.tensor_model_parallel_size > 1 and not keys.sequence_parallel:
        raise UserError(
            f"model.tensor_model_parallel_size={keys.tensor_model_parallel_size} with experts requires sequence "
            "parallelism; set model.sequence_parallel=true"
        )
    _check_options(config, fields)


def _check_options(config: RunConfig, fields: Mapping[str, Any]) -> None:
    given = config.model.arch.extra
    if config.precision.fp8_simulation:
        raise UserError("precision.fp8_simulation=true: experts are not simulated; set it to false")
    for name, why in _REFUSED.items():
        if fields.get(name) is not None:
            raise UserError(f"model.arch.extra.{name}={fields[name]}: {why}; set it to null")
    for name in _BALANCING:
        if given.get(name) not in (None, 0, "none"):
            raise UserError(
                f"model.arch.extra.{name}={given[name]}: load-balancing losses are disabled, because Megatron weights "
                "them by tokens, but objectives weight prompts; leave it out"
            )
    if fields.get("moe_layer_freq", 1) != 1:
        raise UserError(
            f"model.arch.extra.moe_layer_freq={fields['moe_layer_freq']}: only models with experts in every layer "
            "are supported; choose another model"
        )
