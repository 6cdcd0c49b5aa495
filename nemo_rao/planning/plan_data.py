"""What a plan reads from a run's data, if it is on this machine: the number of prompts and of responses.

Rows are counted before tokenization, so rows that a run will drop, mainly for their length, are included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_rao.config.derived import total_steps
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError
from nemo_rao.planning.whole_run import RunLength, num_validations
from nemo_rao.rows.reading import HUB, expand_paths, read_rows


@dataclass(frozen=True)
class DataSize:
    """Number of prompts, and maximum number of responses per prompt."""

    prompts: int
    responses: int


def size_of(config: RunConfig, paths: Any) -> DataSize | None:
    """Return the size of a source of the recipe; ``None`` if unset, not here, on the Hugging Face Hub, or only prompts.

    Raises:
        UserError: it is here but cannot be read.
    """
    if paths is None or not _is_here(paths) or config.online.num_generations is not None:
        return None
    prompts = responses = 0
    keys = config.data
    rows = read_rows(
        paths,
        reward_field=keys.reward_field,
        columns=keys.columns,
        ignore_fields=keys.ignore_fields,
        on_bad=_passed_over if keys.bad_rows == "drop" else None,
    )
    for row in rows:
        prompts += 1
        responses = max(responses, len(row.responses))
    return DataSize(prompts, responses)


def _passed_over(complaint: UserError) -> None:
    """Do nothing: a run drops the row and counts it."""


def run_length(
    config: RunConfig, *, training: DataSize | None, validation: DataSize | None, prompts: int | None = None
) -> RunLength | None:
    """Return the steps of the whole run; ``None``: unknown.

    Args:
        training, validation: sizes of the recipe's data, if it is here.
        prompts: number of training prompts, instead of those counted.

    Raises:
        UserError: the data has fewer prompts than the recipe draws, or than a global batch has.
    """
    wanted, trainer = config.data.num_prompts, config.trainer
    if prompts is not None and prompts < 1:
        raise UserError(f"--prompts {prompts}: must be at least 1.")
    if prompts is None and training is not None:
        prompts = training.prompts
    if wanted is not None and prompts is not None and wanted > prompts:
        raise UserError(
            f"data.num_prompts={wanted}: the training data has only {prompts}. Lower it, or set it to null for all."
        )
    used = prompts if wanted is None else wanted
    if used is not None and (trainer.max_steps or trainer.max_epochs):
        steps = total_steps(config, used)
    elif trainer.max_steps is not None:
        steps = trainer.max_steps
    else:
        return None
    if config.data.validation_path is None or config.online.num_generations is not None:
        return RunLength(steps, used, validation_prompts=0, validations=0)
    return RunLength(
        steps,
        used,
        validation_prompts=None if validation is None else validation.prompts,
        validations=num_validations(steps, trainer.val_check_interval),
    )


def _is_here(paths: Any) -> bool:
    try:
        return not any(source.startswith(HUB) for source in expand_paths(paths))
    except UserError:
        return False
