"""Values derived from a run's keys: parallel sizes, the objective's block, directories."""

import math
from pathlib import Path
from typing import Any, cast

from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.choice import Responses
from nemo_rao.data.order import steps_per_epoch
from nemo_rao.objectives import registry


def objective_config(config: RunConfig) -> Any:
    """The block of the run's objective, an instance of that objective's ``config_type``."""
    return vars(config.model)[config.model.objective]


def chosen_responses(config: RunConfig) -> Responses:
    """Which of a prompt's responses are used: ``data.responses``, or what null means for the objective."""
    if config.data.responses is not None:
        return cast(Responses, config.data.responses)
    return "best_worst" if registry.get(config.model.objective).needs_of(objective_config(config)).pairs else "all"


def total_steps(config: RunConfig, num_prompts: int) -> int:
    """Number of optimizer steps of the whole run on ``num_prompts`` training prompts.

    Raises:
        UserError: the prompts do not fill one global batch.
    """
    per_epoch = steps_per_epoch(num_prompts, config.model.global_batch_size)
    if config.online.num_generations is not None:
        per_epoch *= config.online.epochs  # passes over each rollout
    limits = [config.trainer.max_steps, config.trainer.max_epochs and config.trainer.max_epochs * per_epoch]
    return min(limit for limit in limits if limit is not None)


def world_size(config: RunConfig) -> int:
    """Number of ranks of the run."""
    return config.trainer.devices * config.trainer.num_nodes


def data_parallel_size(config: RunConfig) -> int:
    """Number of model replicas, each of which processes a different part of a global batch."""
    model = config.model
    copy = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    return world_size(config) // copy


def parallel_multiple(config: RunConfig) -> int:
    """Number of tokens that a sequence's length must be a multiple of, so that ranks can split it."""
    keys = config.model
    context, tensor = keys.context_parallel_size, keys.tensor_model_parallel_size if keys.sequence_parallel else 1
    return math.lcm(context * tensor, 2 * context if context > 1 else 1)  # two chunks on each context-parallel rank


def run_dir(config: RunConfig) -> Path:
    """The directory of this run: checkpoints and logs."""
    return Path(config.exp_manager.exp_dir).expanduser() / config.exp_manager.name


def reference_dir(config: RunConfig) -> Path:
    """The directory of reference log-probabilities, shared by all runs of ``exp_dir`` and keyed by fingerprint."""
    return _shared_dir(config, config.reference.cache_dir, "reference")


def data_cache_dir(config: RunConfig) -> Path | None:
    """The directory of tokenized data, shared by all runs of ``exp_dir``; ``None``: no cache."""
    return _shared_dir(config, config.data.cache_dir, "tokenised") if config.data.cache else None


def _shared_dir(config: RunConfig, given: str | None, name: str) -> Path:
    return Path(given).expanduser() if given is not None else Path(config.exp_manager.exp_dir).expanduser() / name
