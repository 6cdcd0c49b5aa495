"""A finished run as a trained model: its recipe and its last checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import hugging_face_file, last_checkpoint, stored_tensors
from nemo_rao.checkpoint.pickles import refuse_code
from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.objectives.base import SCORE_HEAD, Needs


@dataclass(frozen=True)
class TrainedRun:
    """A run whose last checkpoint is used by another run or a command.

    Attributes:
        config: its recipe.
        objective_config: keys of its objective; for a reward model, with the number of scores of its head.
        checkpoint: its last checkpoint.
    """

    config: RunConfig
    objective_config: Any
    checkpoint: Path

    @property
    def needs(self) -> Needs:
        """Needs of its objective; ``needs.scores`` if it is a reward model."""
        return registry.get(self.config.model.objective).needs_of(self.objective_config)


def trained_run(run: str) -> TrainedRun:
    """Return the run in a directory.

    Raises:
        UserError: it is not a run, has no checkpoint, or trained only adapters.
    """
    folder = Path(run).expanduser()
    if not (folder / "recipe.yaml").is_file():
        if (found := hugging_face_file(folder)) is not None:
            raise UserError(
                f"{run}: is a model in Hugging Face's format (it has {found}), but `model:` takes the directory of a "
                "run. Import the model with nemo-rao import-hf and train from it."
            )
        raise UserError(f"{run}: has no recipe.yaml. Give the directory of a training run.")
    config = load_recipe(folder / "recipe.yaml")
    if config.model.peft.scheme != "none":
        raise UserError(
            f"{run}: trained only adapters ({config.model.peft.scheme}). Name a run that trained all weights."
        )
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{run}: has no complete checkpoint in checkpoints/. Train it first.")
    if not config.model.allow_pickle:
        refuse_code(checkpoint, run)
    trained = TrainedRun(config, objective_config(config), checkpoint)
    if trained.needs.scores and hasattr(trained.objective_config, "num_attributes"):
        keys = dataclasses.replace(trained.objective_config, num_attributes=_num_scores(trained))
        return dataclasses.replace(trained, objective_config=keys)
    return trained


def _num_scores(trained: TrainedRun) -> int:
    for name, (shape, _) in stored_tensors(trained.checkpoint, trusted=trained.config.model.allow_pickle).items():
        if name.endswith(f"{SCORE_HEAD}.weight"):
            return shape[0]
    raise UserError(f"{trained.checkpoint}: has no score head. Name the run of a reward model.")
