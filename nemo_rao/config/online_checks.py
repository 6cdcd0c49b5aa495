"""Checks of the keys of ``online`` and the keys that they depend on, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry

_OF_RESPONSES = "applies only to responses in files, but with online.num_generations the run samples its own"
# Keys of ``data`` that have no effect on prompts, and the reason.
_NOT_OF_PROMPTS = {
    **dict.fromkeys(("num_responses", "responses", "pairs_by", "reward_field", "truncated", "answers"), _OF_RESPONSES),
    **dict.fromkeys(("bad_rows", "max_bad_rows"), _OF_RESPONSES),
    **dict.fromkeys(
        ("cache", "cache_dir"), "a run with online.num_generations reads only prompts, which are not cached"
    ),
}

# Objectives that multiply each token's loss by its importance weight.
_WEIGHING_TOKENS = ("ppo", "grpo")


def check_online(config: RunConfig) -> None:
    """Check the keys of ``online`` and the keys that they depend on.

    Raises:
        UserError: on the first violated rule.
    """
    keys, model = config.online, config.model
    objective = registry.get(model.objective)
    needs = objective.needs_of(objective_config(config))
    number = keys.num_generations
    if number is None:
        if needs.samples:
            raise UserError(
                f"model.objective={objective.name} trains on samples of its own policy; set online.num_generations, "
                "such as 4, and online.reward"
            )
        _refuse_without_samples(config)
        return
    if not (needs.rewards or needs.preference) or needs.scores or needs.attributes or needs.kl_estimate:
        raise UserError(
            f"online.num_generations={number}: objective {objective.name} does not learn from rewards of samples; "
            "choose ppo, rloo, grpo, rpo or rao, or set it to null"
        )
    if number < needs.min_responses:
        raise UserError(
            f"online.num_generations={number}: objective {objective.name} compares a prompt's responses and needs at "
            f"least {needs.min_responses}"
        )
    if keys.temperature == 0 and number > 1:
        raise UserError(
            f"online.temperature=0: gives the same response {number} times; raise it, or set online.num_generations=1"
        )
    if keys.max_new_tokens >= model.seq_length:
        raise UserError(
            f"online.max_new_tokens={keys.max_new_tokens} leaves no token of model.seq_length={model.seq_length} for "
            "the prompt; change one of them"
        )
    if keys.top_p == 0:
        raise UserError("online.top_p=0: leaves no token; set it to 1 to keep all")
    if model.context_parallel_size > 1:
        raise UserError(
            f"model.context_parallel_size={model.context_parallel_size}: sampling does not split sequences over ranks; "
            "set it to 1"
        )
    if config.precision.fp8 is not None:
        raise UserError(
            f"precision.fp8={config.precision.fp8}: sampling decodes single tokens, which FP8 matrix products do "
            "not support; set it to null"
        )
    if needs.reference and model.restore_from_path is None:
        raise UserError(
            "model.restore_from_path is null: the reference policy of an online run is its starting checkpoint; set it"
        )
    if needs.reference and model.peft.scheme == "dora":
        raise UserError(
            "model.peft.scheme=dora: its magnitudes cannot be switched off for the reference policy; set it to lora or "
            "canonical_lora"
        )
    if needs.reference and model.optim.overlap_param_gather:
        raise UserError(
            "model.optim.overlap_param_gather=true: weights that are still being gathered cannot be swapped for the "
            "reference policy's; set it to false"
        )
    if keys.sampler == "vllm":
        _check_vllm(config)
    _refuse_without_effect(config)
    _refuse_keys_of_files(config)


def _refuse_without_samples(config: RunConfig) -> None:
    for name, value in _changed(config.online):
        raise UserError(
            f"online.{name}={value}: applies only to samples, but online.num_generations is null, so the run trains on "
            "the responses in the data; set that, such as to 4, or leave this out"
        )


def _refuse_without_effect(config: RunConfig) -> None:
    """Refuse keys that have no effect with the present value of another key."""
    keys = config.online
    missing = {
        "vllm_": "online.sampler=vllm" if keys.sampler != "vllm" else None,
        "cut_reward": "online.cut_responses=penalty" if keys.cut_responses != "penalty" else None,
        "validation_generations": "data.validation_path" if config.data.validation_path is None else None,
    }
    for name, value in _changed(keys):
        for start, other in missing.items():
            if name.startswith(start) and other is not None:
                raise UserError(f"online.{name}={value}: has no effect without {other}; set that, or leave this out")


def _refuse_keys_of_files(config: RunConfig) -> None:
    """Refuse keys that apply only to responses in files, or to the reference pass before training."""
    for name, value in _changed(config.data):
        if name in _NOT_OF_PROMPTS:
            raise UserError(f"data.{name}={value}: {_NOT_OF_PROMPTS[name]}; leave it out")
    for name, value in _changed(config.reference):
        raise UserError(
            f"reference.{name}={value}: applies only to the reference pass before training, but with "
            "online.num_generations each rollout has its own; leave it out"
        )


def _changed(keys: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a group's keys that differ from their defaults."""
    usual = type(keys)()
    for field in dataclasses.fields(keys):
        if (value := getattr(keys, field.name)) != getattr(usual, field.name):
            yield field.name, value


def _check_vllm(config: RunConfig) -> None:
    keys, model = config.online, config.model
    if keys.vllm_python is None:
        raise UserError(
            "online.sampler=vllm: vLLM runs in a separate environment; set online.vllm_python to its interpreter "
            "(make install-vllm creates .venv-vllm/bin/python)"
        )
    if model.peft.scheme not in ("none", "lora"):
        raise UserError(
            f"model.peft.scheme={model.peft.scheme}: such adapters are not merged into the weights sent to vLLM; "
            "set it to lora, or online.sampler=megatron"
        )
    if model.optim.overlap_param_gather:
        raise UserError(
            "model.optim.overlap_param_gather=true: weights that are still being gathered cannot be sent to vLLM; set "
            "it to false"
        )
    if keys.vllm_importance_cap is not None and model.objective not in _WEIGHING_TOKENS:
        raise UserError(
            f"online.vllm_importance_cap={keys.vllm_importance_cap}: objective {model.objective} does not weight "
            f"single tokens; leave it out, or choose {' or '.join(_WEIGHING_TOKENS)}"
        )
    if len(set(keys.vllm_gpus)) < len(keys.vllm_gpus):
        raise UserError(f"online.vllm_gpus={keys.vllm_gpus}: names a GPU twice")
