"""Check that the run reports the metric that ranks checkpoints, and at the steps that are ranked."""

from __future__ import annotations

import torch

from nemo_rao.batch import ObjectiveBatch, RewardSummary, Tokens
from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.objectives import registry

_KEYS = "exp_manager.checkpoint_callback_params"
_VALIDATION = "val/"
# What nemo_rao.loop.metrics reports for a training step in addition to the objective's metrics. perf/mfu and similar
# metrics are left out, because only some GPUs have them.
_OF_STEPS = ("grad_norm", "lr", "seconds/update", "tokens_per_second", "data/token_efficiency", "data/tokens_shared")

# What nemo_rao.loop.critic reports in addition to the metrics of the critic's objective.
_OF_CRITIC = ("ppo/critic_grad_norm", "ppo/critic_lr", "seconds/critic")
# What nemo_rao.rollout.metrics reports for the samples of every run, and the prefix of metrics named after scorers.
_OF_SAMPLES = ("reward", "reward_std", "reward_p10", "reward_p50", "reward_p90", "unscored", "entropy", "length", "cut")
_SCORES = "scores/"


def validation_intervals(config: RunConfig) -> set[int]:
    """Optimizer steps between validations: the recipe's, and those between checkpoints ranked by a ``val/`` metric."""
    keys = config.exp_manager.checkpoint_callback_params
    ranked = keys.monitor is not None and keys.monitor.startswith(_VALIDATION) and keys.save_top_k != 0
    return {config.trainer.val_check_interval, *([keys.every_n_train_steps] if ranked else [])}


def check_monitor(config: RunConfig) -> None:
    """Check the keys that rank checkpoints.

    Raises:
        UserError: no metric to rank by is set, or the run will not report it.
    """
    keys = config.exp_manager.checkpoint_callback_params
    if keys.monitor is None:
        if keys.save_top_k > 1:
            raise UserError(
                f"{_KEYS}.save_top_k={keys.save_top_k} requires a metric to rank by; set {_KEYS}.monitor, "
                "such as val/loss"
            )
        return
    if keys.monitor.startswith(_VALIDATION) and config.data.validation_path is None:
        raise UserError(
            f"{_KEYS}.monitor={keys.monitor} requires validation data; set data.validation_path, or choose another "
            "metric, such as loss"
        )
    if keys.monitor.startswith(_VALIDATION + _SCORES) and len(config.online.reward) > 1:
        return  # scorers have no names before they are created
    reported = _reported(config)
    if reported is not None and keys.monitor not in reported:
        hint = did_you_mean(keys.monitor, reported) or f"; choose one of {', '.join(sorted(reported))}"
        raise UserError(
            f"{_KEYS}.monitor={keys.monitor}: a run with objective {config.model.objective} reports no such "
            f"metric{hint}"
        )


def _reported(config: RunConfig) -> set[str] | None:
    """Names of all metrics of a run; ``None`` if they depend on the data."""
    objective = registry.get(config.model.objective)
    try:
        rewards = RewardSummary(mean=0.5, low=0.0, high=1.0, all_labels=True, all_ranked=True)
        keys = objective.resolve(objective_config(config), rewards)
    except UserError:
        return None  # its keys require other rewards than these
    needs = objective.needs_of(keys)
    # An objective's metrics have the same names for every batch.
    batch = _any_batch(max(2, needs.min_responses))
    of_objective = {"loss", *objective.loss(batch, keys).metrics}
    of_steps = {*of_objective, *_OF_STEPS}
    if needs.critic:
        assert objective.critic is not None
        of_steps |= {*objective.critic.loss(batch, keys).metrics, *_OF_CRITIC}
    of_validation = of_objective
    if config.online.num_generations is not None:
        of_validation = {*_OF_SAMPLES, *(["kl"] if needs.reference else [])}
        if config.online.mini_batches * config.online.epochs == 1:  # each step has a rollout
            of_steps |= {f"rollout/{name}" for name in of_validation}
    validated = {_VALIDATION + name for name in of_validation} if config.data.validation_path is not None else set()
    return {*of_steps, *validated}


def _any_batch(num_responses: int) -> ObjectiveBatch:
    """One prompt with ``num_responses`` responses and every input that an objective may need."""
    zeros, ones = torch.zeros(1, num_responses), torch.ones(1, num_responses)
    return ObjectiveBatch(
        prompt_logps=zeros,
        response_logps=zeros,
        reference_prompt_logps=zeros,
        reference_response_logps=zeros,
        rewards=torch.linspace(0, 1, num_responses)[None],
        lengths=ones,
        prompt_lengths=ones,
        valid=ones > 0,
        ranked=torch.ones(1, dtype=torch.bool),
        reference_rewards=torch.linspace(0, 1, num_responses)[None],
        values=zeros,
        scores=zeros[:, :, None],
        kl_estimate=torch.zeros(()),
        tokens=Tokens(
            mask=ones[:, :, None] > 0,
            **dict.fromkeys(
                ("logps", "old", "importance", "reference", "values", "old_values", "advantages", "returns"),
                zeros[:, :, None],
            ),
        ),
    )
