"""All checks of a run that precede heavy imports."""

from __future__ import annotations

from nemo_rao.checkpoint.starting import check_start
from nemo_rao.config.checks import check_config
from nemo_rao.config.run_config import RunConfig


def check_run(config: RunConfig, *, start_exists: bool = True) -> None:
    """Checks everything that the config alone, and the files it names, can tell.

    Args:
        start_exists: ``False`` where another run is still to make the checkpoint to start from.

    Raises:
        UserError: the first rule that does not hold.
    """
    check_config(config)
    if start_exists:
        check_start(config)
