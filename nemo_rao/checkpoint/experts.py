"""What may change when a run with experts resumes."""

from __future__ import annotations

from pathlib import Path

from nemo_rao.checkpoint.find import last_checkpoint
from nemo_rao.checkpoint.run_records import read_run
from nemo_rao.config.engine_choice import BRIDGE
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError


def check_resumed_experts(config: RunConfig, folder: Path) -> None:
    """Refuse to change between split experts and experts that are not split when a run resumes.

    Megatron has a separate optimizer for split experts, which a checkpoint stores separately; everything else in it can
    be loaded under any parallelism. Megatron-Bridge can load that, too (:mod:`nemo_rao.mcore.checkpoint`), with the
    distributed optimizer.

    Args:
        folder: directory of the run.

    Raises:
        UserError: names both sizes.
    """
    saved = folder / "recipe.yaml"
    if not saved.is_file() or last_checkpoint(folder) is None or not config.exp_manager.resume_if_exists:
        return
    before, now = load_recipe(saved).model.expert_model_parallel_size, config.model.expert_model_parallel_size
    read_by_part = read_run(folder).get("engine") == BRIDGE and config.model.optim.use_distributed_optimizer
    if (before > 1) != (now > 1) and not read_by_part:
        raise UserError(
            f"model.expert_model_parallel_size={now}: {folder} was trained with {before}, and optimizer states of "
            "split experts cannot be loaded for experts that are not split, nor the reverse. Set it to "
            f"{before if before == 1 else 'more than 1'}, or start another exp_manager.name from its checkpoint with "
            "model.restore_from_path."
        )
