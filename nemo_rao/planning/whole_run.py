"""Duration of a whole run, in hours and GPU-hours: steps, rollouts or the reference pass, validations.

Not counted: reading and tokenizing data, scorers, building the model, checkpoints, queueing and startup on a cluster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_rao.planning.machine import Machine
from nemo_rao.planning.rollouts import rollout_time
from nemo_rao.planning.setting import Setting
from nemo_rao.planning.step_time import forward_seconds, step_time


@dataclass(frozen=True)
class RunLength:
    """Length of a run.

    Attributes:
        steps: optimizer steps.
        prompts: training prompts in use; ``None``: unknown, and the reference pass is not counted.
        validation_prompts: validation prompts; ``None``: their number is unknown, and neither validations nor their
            part of the reference pass are counted.
        validations: number of validations.
    """

    steps: int
    prompts: int | None
    validation_prompts: int | None
    validations: int


@dataclass(frozen=True)
class RunTime:
    """Seconds of a run's parts; ``None``: unknown and not part of any sum.

    Attributes:
        training: steps, including a critic's.
        rollouts: rollouts of a run that samples, with their passes for log-probabilities.
        reference: the pass before the first step.
        validation: all validations.
    """

    training: float
    rollouts: float
    reference: float | None
    validation: float | None

    @property
    def total(self) -> float:
        return self.training + self.rollouts + (self.reference or 0.0) + (self.validation or 0.0)

    def gpu_hours(self, setting: Setting) -> float:
        return self.total / 3600 * setting.ranks


def num_validations(steps: int, interval: int) -> int:
    """Number of validations: before the first step, at every interval, and at the end."""
    return 1 + steps // interval + (steps % interval > 0)


def run_time(length: RunLength, setting: Setting, machine: Machine) -> RunTime:
    validation: float | None = None
    if length.validation_prompts is not None:
        once = _scoring(setting, machine, length.validation_prompts, mismatched=setting.kl_estimate)
        validation = length.validations * once
    rollouts = 0.0
    if setting.rollouts is not None:
        rollouts = math.ceil(length.steps / setting.rollouts.steps) * rollout_time(setting, machine).total
    step = step_time(setting, machine).total
    if setting.critic is not None:
        step += step_time(setting.critic, machine).total
    return RunTime(
        training=length.steps * step,
        rollouts=rollouts,
        reference=_reference(length, setting, machine),
        validation=validation,
    )


def reference_seconds(setting: Setting, machine: Machine, prompts: int) -> float:
    """Seconds of the reference pass over so many prompts, with mismatched responses if the objective has them."""
    passing = setting.of_reference_pass()
    return _scoring(passing, machine, prompts, mismatched=setting.kl_estimate, in_a_row=setting.reference_in_a_row)


def _reference(length: RunLength, setting: Setting, machine: Machine) -> float | None:
    if not setting.reference or setting.rollouts is not None:
        return 0.0
    if length.prompts is None:
        return None
    both = (length.prompts, length.validation_prompts or 0)
    return sum(reference_seconds(setting, machine, prompts) for prompts in both)


def _scoring(
    setting: Setting, machine: Machine, prompts: int, *, mismatched: bool, in_a_row: int | None = None
) -> float:
    found = forward_seconds(setting, machine, prompts=prompts, in_a_row=in_a_row)
    if mismatched:
        found += forward_seconds(setting, machine, prompts=prompts, responses=1, in_a_row=in_a_row)
    return found
