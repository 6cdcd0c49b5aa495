"""Rendering settings of the run that wrote a checkpoint, from its recipe."""

from __future__ import annotations

from pathlib import Path

from nemo_rao.checkpoint.run_records import RECIPE
from nemo_rao.data.rendering_record import Rendering, checked_rendering
from nemo_rao.errors import UserError


def rendering_of_run(checkpoint: Path) -> Rendering | None:
    """Read the rendering from the recipe of the checkpoint's run; ``None`` without a run, as for an imported model.

    Only the relevant keys are read, so that runs of other versions can be exported.

    Raises:
        UserError: the recipe cannot be read, or has a value that is not allowed.
    """
    import yaml

    recipe = checkpoint.resolve().parent.parent / RECIPE
    if checkpoint.resolve().parent.name != "checkpoints" or not recipe.is_file():
        return None
    try:
        found = yaml.safe_load(recipe.read_text())
        data = found["data"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{recipe}: cannot be read as a recipe ({type(error).__name__}: {reason}), so the rendering of the model's "
            "prompts is unknown. Restore the file, or move it away to export without rendering settings."
        ) from None
    return checked_rendering(data, f"{recipe}: data.")
