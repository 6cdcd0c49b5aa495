"""The learning rate of each step, the same on every engine.

    warm-up     highest * (step + 1) / (warmup_steps + 1)
    cosine      from highest after the warm-up to min_lr at the run's last step
    constant    highest

With ``constant_steps`` the warm-up is Megatron's, ``highest * step / warmup_steps``: the first step's rate is 0. The
cosine then ends before these last steps, which use min_lr. Steps count from 0.
"""

from __future__ import annotations

import math

from nemo_rao.config.model_config import ScheduleConfig


def learning_rate(keys: ScheduleConfig, step: int, *, highest: float, max_steps: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        step: counted from 0.
        highest: highest rate of the parameter group.
        max_steps: steps of the whole run.
    """
    warmup = keys.warmup_steps
    held = keys.constant_steps if keys.name == "cosine" else 0
    if 0 < warmup >= step:
        return highest * (step / warmup if held else (step + 1) / (warmup + 1))
    if keys.name == "constant":
        return highest
    decay = max_steps - warmup - held
    if step > warmup + decay:
        return keys.min_lr
    return keys.min_lr + (highest - keys.min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))
