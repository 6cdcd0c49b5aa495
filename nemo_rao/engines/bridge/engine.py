"""Megatron-Bridge as an engine; see :class:`nemo_rao.engines.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.checkpoint.starting import needs_start
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.store import PreferenceData
from nemo_rao.mcore import cpu
from nemo_rao.runtime.console import quiet_imports
from nemo_rao.runtime.job import leave_if_stopped

if TYPE_CHECKING:
    from nemo_rao.loop.prepared import Prepared
    from nemo_rao.loop.session import Hook, Session


def load() -> bool:
    with quiet_imports():
        on_cpu = cpu.install_if_needed()
        from nemo_rao.engines.bridge.seams import import_bridge

        import_bridge(on_cpu=on_cpu)
        from nemo_rao.engines.bridge import run  # noqa: F401
    return on_cpu


def model_config(config: RunConfig) -> Any:
    from nemo_rao.engines.bridge import provider

    return provider.model_config(config)


def train_rank(
    config: RunConfig,
    prepared: Prepared,
    record: Callable[[], None],
    change: Callable[[list[Hook]], list[Hook]],
) -> None:
    from nemo_rao.engines.bridge.run import Run
    from nemo_rao.loop.run_hooks import data_sets_of, hooks_of, training_data

    run = Run(config, prepared.objective_config, max_steps=prepared.max_steps)
    data_sets = data_sets_of(config, prepared, pad_token_id=run.pad_token_id)
    hooks = change(hooks_of(config, run.loss.needs, data_sets, record, prepared))
    with run.built(
        training_data(config, data_sets["training"], prepared.asked),
        folder=run_dir(config),
        start_from=prepared.start_from if needs_start(config) else None,
    ):
        run.train(hooks, resume_from=prepared.resume_from)
    leave_if_stopped()


def pass_rank(
    config: RunConfig,
    objective_config: Any,
    data: PreferenceData,
    checkpoint: Path,
    folder: Path,
    compute: Callable[[Session], None],
) -> None:
    from nemo_rao.engines.bridge.run import Run
    from nemo_rao.loop.data import AlignmentData, batch_layout
    from nemo_rao.loop.run_hooks import training_data

    run = Run(config, objective_config, max_steps=1)
    laid_out = AlignmentData(data, pad_token_id=run.pad_token_id, **batch_layout(config))
    with run.built(training_data(config, laid_out), folder=folder, start_from=checkpoint):
        compute(run.session())
