"""NeMo's Megatron strategy: reads checkpoints where the optimizer is torch's own Adam, or a head is new; fp16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.utils import get_model_config
from nemo import lightning as nl
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from torch import Tensor

from nemo_rao.mcore.heads import heads, is_stored
from nemo_rao.mcore.seeds import seed_weights

# Entries of an optimizer's group of parameters that a recipe sets.
_HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps")


class AlignmentStrategy(nl.MegatronStrategy):
    """``MegatronStrategy`` that restores torch's Adam exactly.

    Where neither apex nor Transformer Engine is installed, megatron-core's distributed optimizer wraps torch's Adam,
    whose state differs from theirs in one entry: each parameter has a 0-dim ``step``. Reading a checkpoint
    (megatron-core 0.15) expects that state to exist already, looks for ``step`` among the stored tensors, where it is
    not, and in the end lets all parameters share one ``step``, which every one of them would advance.

    In fp16 the loss is multiplied by the optimizer's loss scale.

    Attributes:
        seed: of the initial weights, to be set before the run is started: NeMo takes the same one for every run. No
            argument, as NeMo stores those with every checkpoint.
        of_recipe: for each optimizer, the hyperparameters of its groups of parameters as the recipe has them; a
            checkpoint brings its own.

    A run that starts from a checkpoint without its head, or with one of another size, starts with a new one
    (:mod:`nemo_rao.mcore.heads`).
    """

    seed: int

    def setup_distributed(self) -> None:
        super().setup_distributed()
        seed_weights(self.seed)

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        new = list(heads(self.megatron_parallel))
        if new:
            metadata = load_tensors_metadata(str(ckpt_to_weights_subdir(checkpoint_path, is_saving=False)))
            stored = {name: tensor.global_shape for name, tensor in metadata.items()}
            for head in new:
                head.stored = is_stored(head.name, head.weight.shape, stored)
        try:
            return super().load_checkpoint(checkpoint_path, selective_restore)
        finally:
            for head in new:
                head.stored = True

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.of_recipe = [
            [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]
        for optimizer in self.optimizers:
            if optimizer.mcore_optimizer.config.fp16:
                # Megatron divides fp16's gradients by the loss scale; NeMo has nobody multiply the loss by it.
                for chunk in self.megatron_parallel:
                    get_model_config(chunk).grad_scale_func = optimizer.mcore_optimizer.scale_loss

    def optimizer_sharded_state_dict(self, is_loading: bool = False, metadata: dict | None = None) -> dict[str, Any]:
        if is_loading:
            for optimizer in self._optimizers_around_torch_adam():
                _allocate_state(optimizer.optimizer)
                _keep_step_when_states_are_set(optimizer)
        return super().optimizer_sharded_state_dict(is_loading=is_loading, metadata=metadata)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        for optimizer in self._optimizers_around_torch_adam():
            for state in optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()

    def _optimizers_around_torch_adam(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            for megatron_optimizer in optimizer.mcore_optimizer.chained_optimizers:
                if isinstance(megatron_optimizer.optimizer, torch.optim.Adam):
                    yield megatron_optimizer


def _allocate_state(adam: torch.optim.Adam) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _keep_step_when_states_are_set(optimizer: Any) -> None:
    if not optimizer.config.use_distributed_optimizer:
        return
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(model_param: Any, tensors: Mapping[str, Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[model_param]
        main_param = optimizer.optimizer.param_groups[group]["params"][order]
        original(model_param, {**tensors, "step": optimizer.optimizer.state[main_param]["step"]})

    optimizer._set_main_param_and_optimizer_states = set_states
