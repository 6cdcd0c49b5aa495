"""Prepare a run before any rank starts: data, sizes, checkpoints. Errors are reported here, once.

Ordered by cost: the environment first, then the data, and last what imports the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_rao.batch import RewardSummary
from nemo_rao.checkpoint.adapters import base_on_resume, check_scheme
from nemo_rao.checkpoint.experts import check_resumed_experts
from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.checkpoint.starting import needs_start, start_of
from nemo_rao.config.derived import objective_config, run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.mismatched import mismatched
from nemo_rao.loop.prepared import CriticTask, OnlineTask, Prepared
from nemo_rao.objectives import registry
from nemo_rao.rollout.vllm_model import VllmModel
from nemo_rao.training.critics import critic_of
from nemo_rao.training.loading import LoadedData, drawn, drawn_prompts, load_data
from nemo_rao.training.model_checks import check_model
from nemo_rao.training.online_rewards import TextScorersOfRun, check_rules, scorers_of
from nemo_rao.training.online_vllm import python_of_sampler, vllm_model
from nemo_rao.training.reward_models import RewardModelOfRun
from nemo_rao.training.steps import plan_steps


def prepare(config: RunConfig, loaded: LoadedData | None = None) -> Prepared:
    """Check and compute everything that does not need a model. See :func:`train` for the errors.

    Args:
        loaded: the result of :func:`load_data`, if already known; it is loaded otherwise.
    """
    keys, objective = config.model, registry.get(config.model.objective)
    needs = objective.needs_of(objective_config(config))
    scorers, models = (None, {}) if config.online.num_generations is None else scorers_of(config)
    critic = critic_of(config)
    vllm_python = python_of_sampler(config)
    loaded = loaded or load_data(config)
    if scorers is not None:
        check_rules(config, [*loaded.prompts, *loaded.validation_prompts])
    for model in models.values():
        model.check_tokens(config, loaded)
    if critic is not None:
        critic.check_tokens(config, loaded)
    data, validation = drawn(config, loaded), loaded.validation
    others = {}
    if needs.kl_estimate:
        sources = {"train": data} if validation is None else {"train": data, "validation": validation}
        for name, source in sources.items():
            others[name] = mismatched(source, seq_length=keys.seq_length, seed=config.data.seed)

    # Rewards of samples are not known yet: what depends on them is resolved again for each rollout.
    rewards = data.reward_summary() if scorers is None else RewardSummary(mean=0.0)
    resolved = objective.resolve(objective_config(config), rewards)
    if validation is not None and scorers is None:
        objective.resolve(objective_config(config), validation.reward_summary())
    planned = plan_steps(config, data, validation)
    resume_from = last_checkpoint(run_dir(config)) if config.exp_manager.resume_if_exists else None
    start_from = start_of(config)
    if planned.finished_at is None:
        check_resumed_experts(config, run_dir(config))
        if resume_from is not None:
            check_scheme(config, resume_from)
            if keys.peft.scheme != "none":
                assert start_from is not None  # check_run
                start_from = base_on_resume(resume_from, start_from, f"exp_manager.name={config.exp_manager.name}")
        check_model(config, loaded.num_tokens, start_from if needs_start(config) else None, resume_from)
        for model in models.values():
            model.check_model(loaded.num_tokens)
        if critic is not None:
            critic.check_model(loaded.num_tokens, resume_from)
    vllm = None
    if vllm_python is not None and planned.finished_at is None:
        vllm = vllm_model(config, vllm_python, loaded.num_tokens)
    return Prepared(
        train=data,
        validation=validation,
        mismatched=others,
        pad_token_id=loaded.pad_token_id,
        objective_config=resolved,
        max_steps=planned.max_steps,
        changes=planned.changes,
        finished_at=planned.finished_at,
        resume_from=resume_from,
        start_from=start_from,
        online=None
        if scorers is None
        else _online_task(
            config,
            loaded,
            scorers,
            models,
            vllm=vllm,
            critic=None if critic is None else critic.task(start_from, resume_from),
        ),
    )


def _online_task(
    config: RunConfig,
    loaded: LoadedData,
    scorers: TextScorersOfRun,
    models: Mapping[str, RewardModelOfRun],
    *,
    vllm: VllmModel | None,
    critic: CriticTask | None,
) -> OnlineTask:
    return OnlineTask(
        drawn_prompts(config, loaded),
        scorers,
        [model.scorer(name) for name, model in models.items()],
        config.online.reward_weights,
        loaded.validation_prompts,
        vllm,
        critic,
    )
