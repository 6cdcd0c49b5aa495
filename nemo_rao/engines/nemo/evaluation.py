"""Model chunks that are only asked, in a rank that has its process groups: NeMo's, without a trainer."""

from __future__ import annotations

from typing import Any

from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.nemo import build


def chunks(config: RunConfig, objective_config: Any) -> list[Any]:
    """See :meth:`nemo_rao.engines.engine.Engine.evaluation_chunks`."""
    stages = config.model.virtual_pipeline_model_parallel_size
    return [_chunk(config, objective_config, stage) for stage in ([None] if stages is None else range(stages))]


def _chunk(config: RunConfig, objective_config: Any, virtual_stage: int | None) -> Any:
    model = build.model(config, objective_config, max_steps=1)
    # As a trainer does it: the strategy writes parallel sizes and number formats into the model's config.
    strategy = build.strategy(config)
    strategy.precision_plugin = build.precision(config)
    strategy.connect(model)
    model.config.perform_initialization = False
    model.configure_model(vp_stage=virtual_stage)
    return strategy.precision_plugin.convert_module(model).module.cuda().eval()
