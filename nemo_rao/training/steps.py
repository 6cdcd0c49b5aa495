"""Steps of a run over its data, and those that earlier starts have completed."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rao.checkpoint.continuing import check_data, finished_at
from nemo_rao.checkpoint.run_records import Change, data_record
from nemo_rao.config.derived import total_steps
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.store import PreferenceData
from nemo_rao.runtime.console import say


@dataclass(frozen=True)
class PlannedSteps:
    """A run's steps over its data, and whether they are complete.

    Attributes:
        max_steps, changes, finished_at: see :class:`Prepared`.
    """

    max_steps: int
    changes: list[Change]
    finished_at: int | None


def plan_steps(
    config: RunConfig,
    train: PreferenceData,
    validation: PreferenceData | None,
    *,
    another: str = "exp_manager.name",
) -> PlannedSteps:
    """Plan the steps of a run over its data, and find those that an earlier start has completed.

    Args:
        another: the key or option that selects another output directory, for messages.

    Raises:
        UserError: an earlier start had other data.
    """
    changes = check_data(config, data_record(train, validation), another=another)
    max_steps = _max_steps(config, len(train))
    return PlannedSteps(max_steps, changes, finished_at(config, max_steps))


def _max_steps(config: RunConfig, num_prompts: int) -> int:
    """Return the optimizer steps of the run; report if ``max_epochs`` ends it before ``max_steps``."""
    steps, asked = total_steps(config, num_prompts), config.trainer.max_steps
    if asked is not None and steps < asked:
        say(
            f"trainer.max_steps={asked}, but trainer.max_epochs={config.trainer.max_epochs} ends the run after step "
            f"{steps} ({num_prompts} prompts, model.global_batch_size={config.model.global_batch_size}); "
            "set trainer.max_epochs=null to reach max_steps"
        )
    return steps
