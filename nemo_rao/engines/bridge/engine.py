"""The Megatron-Bridge engine; see :class:`nemo_rao.engines.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rao.checkpoint.starting import needs_start
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.mcore import cpu
from nemo_rao.runtime.console import quiet_imports

if TYPE_CHECKING:
    from nemo_rao.loop.data import TrainingData
    from nemo_rao.loop.prepared import Prepared
    from nemo_rao.loop.session import Hook, Session
    from nemo_rao.objectives.base import Needs


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


def train_rank(config: RunConfig, prepared: Prepared, data: TrainingData, hooks: list[Hook]) -> None:
    from nemo_rao.engines.bridge.run import Run

    run = Run(config, prepared.objective_config, max_steps=prepared.max_steps)
    start_from = prepared.start_from if needs_start(config) else None
    with run.built(data, folder=run_dir(config), start_from=start_from):
        run.train(hooks, resume_from=prepared.resume_from)


def pass_rank(
    config: RunConfig,
    objective_config: Any,
    data: TrainingData,
    checkpoint: Path,
    folder: Path,
    compute: Callable[[Session], None],
) -> None:
    from nemo_rao.engines.bridge.run import Run

    run = Run(config, objective_config, max_steps=1)
    with run.built(data, folder=folder, start_from=checkpoint):
        compute(run.session())


def second_model(config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
    from nemo_rao.engines.bridge import second_model

    return second_model.chunks(config, needs, is_trained=is_trained)
