"""Exact restoration of megatron-core's distributed optimizer around torch's Adam.

If neither apex nor Transformer Engine is installed, the distributed optimizer wraps torch's Adam, whose state differs
from theirs in one entry: each parameter has a 0-dim ``step``. Loading a checkpoint expects that state to exist already,
looks for ``step`` among the stored tensors, where it is not, and finally lets all parameters share one ``step``, which
each of them would increment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def allocate_state(adam: torch.optim.Adam) -> None:
    """Create the state of every parameter that Adam creates in its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def is_torch_adam(optimizer: Any) -> bool:
    """Whether a megatron-core optimizer wraps torch's Adam."""
    return isinstance(optimizer.optimizer, torch.optim.Adam)


def before_reading(optimizer: Any) -> None:
    """Prepare a megatron-core optimizer around torch's Adam for loading a checkpoint."""
    allocate_state(optimizer.optimizer)
    if not optimizer.config.use_distributed_optimizer:
        return
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(model_param: Any, tensors: Mapping[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        original(model_param, {**tensors, "step": optimizer.optimizer.state[main_param]["step"]})

    optimizer._set_main_param_and_optimizer_states = set_states


def after_reading(optimizer: Any) -> None:
    """Finish the loading: every parameter gets a separate ``step``."""
    for state in optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()
