"""A finished run as the model that it has trained: what it says of itself, and its last checkpoint."""

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
        objective_config: the keys of its objective; of a reward model, with the number of scores that its head has.
        checkpoint: its last one.
    """

    config: RunConfig
    objective_config: Any
    checkpoint: Path

    @property
    def needs(self) -> Needs:
        """Of its objective; ``needs.scores``: it is a reward model."""
        return registry.get(self.config.model.objective).needs_of(self.objective_config)


def trained_run(run: str) -> TrainedRun:
    """The run in a folder.

    Raises:
        UserError: it is no run, has no checkpoint, or trained adapters alone.
    """
    folder = Path(run).expanduser()
    if not (folder / "recipe.yaml").is_file():
        if (found := hugging_face_file(folder)) is not None:
            raise UserError(
                f"{run}: is a model in Hugging Face's format (it has {found}); `model:` takes the folder of a run: "
                "import the model with nemo-rao import-hf and train from it"
            )
        raise UserError(f"{run}: no recipe.yaml in it; give the folder of a training run")
    config = load_recipe(folder / "recipe.yaml")
    if config.model.peft.scheme != "none":
        raise UserError(f"{run}: trained adapters ({config.model.peft.scheme}); name a run that trained all weights")
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"{run}: no finished checkpoint in checkpoints/; train it first")
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
    raise UserError(f"{trained.checkpoint}: has no score head; name the run of a reward model")
