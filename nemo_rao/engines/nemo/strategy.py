"""NeMo's Megatron strategy, extended for checkpoints with torch's Adam or a new head, and for fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.utils import get_model_config
from nemo import lightning as nl
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.resume import AdapterPath

from nemo_rao.errors import UserError
from nemo_rao.mcore import torch_adam
from nemo_rao.mcore.checkpoint import COMMON
from nemo_rao.mcore.heads import heads
from nemo_rao.mcore.seeds import seed_weights

# Entries of an optimizer's parameter group that a recipe sets.
_HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps")


class AlignmentStrategy(nl.MegatronStrategy):
    """``MegatronStrategy`` that restores torch's Adam exactly (:mod:`nemo_rao.mcore.torch_adam`).

    In fp16 the loss is multiplied by the optimizer's loss scale.

    Attributes:
        seed: seed of the initial weights, set before the run starts: NeMo uses the same one for every run. Not an
            argument, because NeMo stores those with every checkpoint.
        save_beside: called with the directory of each checkpoint after model and optimizer, which may still be written
            in the background, and before the checkpoint counts as complete; set before the run, if at all.
        of_recipe: for each optimizer, the recipe's hyperparameters of its parameter groups, which override those of a
            checkpoint.

    A run that starts from a checkpoint without its head, or with a head of another size, starts with a new one
    (:mod:`nemo_rao.mcore.heads`).
    """

    seed: int
    save_beside: Callable[[Path], None] | None = None

    def setup_distributed(self) -> None:
        super().setup_distributed()
        seed_weights(self.seed)

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        weights = Path(ckpt_to_weights_subdir(checkpoint_path, is_saving=False))
        if not (weights / COMMON).is_file():
            raise UserError(
                f"model.restore_from_path: {weights} has no {COMMON}: it was written by a newer megatron-core, whose "
                "checkpoints NeMo's cannot read. Start from one written by a run with this version."
            )
        new = list(heads(self.megatron_parallel))
        if new:
            # When adapters are resumed, the model under them is loaded first.
            base = checkpoint_path.base_model_path if isinstance(checkpoint_path, AdapterPath) else checkpoint_path
            metadata = load_tensors_metadata(str(ckpt_to_weights_subdir(base, is_saving=False)))
            stored = {name: tensor.global_shape for name, tensor in metadata.items()}
            for head in new:
                head.look_for(stored)
        try:
            return super().load_checkpoint(checkpoint_path, selective_restore)
        finally:
            for head in new:
                head.stored = head.name

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        if self.save_beside is not None:
            self.save_beside(Path(ckpt_to_dir(filepath)))

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.of_recipe = [
            [{name: group[name] for name in _HYPERPARAMETERS if name in group} for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]
        for optimizer in self.optimizers:
            if optimizer.mcore_optimizer.config.fp16:
                # Megatron divides fp16 gradients by the loss scale, but NeMo does not multiply the loss by it.
                for chunk in self.megatron_parallel:
                    get_model_config(chunk).grad_scale_func = optimizer.mcore_optimizer.scale_loss

    def optimizer_sharded_state_dict(self, is_loading: bool = False, metadata: dict | None = None) -> dict[str, Any]:
        if is_loading:
            for optimizer in self._optimizers_around_torch_adam():
                torch_adam.before_reading(optimizer)
        return super().optimizer_sharded_state_dict(is_loading=is_loading, metadata=metadata)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        for optimizer in self._optimizers_around_torch_adam():
            torch_adam.after_reading(optimizer)

    def _optimizers_around_torch_adam(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            yield from filter(torch_adam.is_torch_adam, optimizer.mcore_optimizer.chained_optimizers)
