"""All checks of a run that precede heavy imports."""

from __future__ import annotations

from nemo_rao.checkpoint.starting import check_start
from nemo_rao.config.checks import check_config
from nemo_rao.config.run_config import RunConfig


def check_run(config: RunConfig, *, start_exists: bool = True, data_exists: bool = True) -> None:
    """Checks everything that the config alone, and the files it names, can tell.

    Args:
        start_exists: ``False`` where another run is still to make the checkpoint to start from.
        data_exists: ``False`` where the data or the tokenizer is still to be made: it is not looked for.

    Raises:
        UserError: the first rule that does not hold.
    """
    check_config(config, data_exists=data_exists)
    if start_exists and data_exists:
        check_start(config)
