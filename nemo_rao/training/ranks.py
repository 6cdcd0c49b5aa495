"""One rank's part of a run, or of a pass over data, up to the engine. The rank's number comes from the environment.

Imported by ranks, with the engine loaded; the imports inside functions import Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.engine import engine_of
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import quiet_third_parties
from nemo_rao.runtime.job import leave_if_stopped

if TYPE_CHECKING:
    from nemo_rao.data.store import PreferenceData
    from nemo_rao.loop.prepared import Prepared
    from nemo_rao.loop.session import Hook, Session


def train_rank(
    config: RunConfig,
    prepared: Prepared,
    record: Callable[[], None],
    change: Callable[[list[Hook]], list[Hook]],
) -> None:
    """Train.

    Args:
        prepared: result of the parent's preparation.
        record: called on rank 0 before the first step, once all checks have passed.
        change: maps the default hooks to those of the run.
    """
    from nemo_rao.loop.run_hooks import data_sets_of, hooks_of, training_data

    _set_up(config)
    needs = registry.get(config.model.objective).needs_of(prepared.objective_config)
    data_sets = data_sets_of(config, prepared)
    hooks = change(hooks_of(config, needs, data_sets, prepared, record))
    data = training_data(config, data_sets["training"], prepared.online)
    engine_of(config).train_rank(config, prepared, data, hooks)
    leave_if_stopped()


def pass_rank(
    config: RunConfig,
    objective_config: Any,
    data: PreferenceData,
    pad_token_id: int,
    checkpoint: Path,
    folder: Path,
    compute: Callable[[Session], None],
) -> None:
    """Call ``compute`` with the model of a checkpoint over ``data``; see :class:`nemo_rao.engines.engine.Engine`."""
    from nemo_rao.loop.data import AlignmentData, batch_layout
    from nemo_rao.loop.run_hooks import training_data

    _set_up(config)
    laid_out = AlignmentData(data, pad_token_id=pad_token_id, **batch_layout(config))
    engine_of(config).pass_rank(config, objective_config, training_data(config, laid_out), checkpoint, folder, compute)


def _set_up(config: RunConfig) -> None:
    quiet_third_parties()
    if config.trainer.threads_per_rank is not None:
        import torch

        torch.set_num_threads(config.trainer.threads_per_rank)
