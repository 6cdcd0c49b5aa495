"""Checks of a run that need no heavy imports."""

from __future__ import annotations

from nemo_rao.checkpoint.starting import check_start
from nemo_rao.config.checks import check_config
from nemo_rao.config.run_config import RunConfig


def check_run(config: RunConfig, *, start_exists: bool = True, data_exists: bool = True) -> None:
    """Check everything that can be decided from the config and the names of the files it refers to.

    Args:
        start_exists: ``False`` if another run has yet to write the checkpoint to start from.
        data_exists: ``False`` if the data or the tokenizer has yet to be written: they are not looked for.

    Raises:
        UserError: on the first violated rule.
    """
    check_config(config, data_exists=data_exists)
    if start_exists and data_exists:
        check_start(config)
