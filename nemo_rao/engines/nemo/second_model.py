"""Chunks of a second model on a run's rank, over the run's process groups, built by NeMo without a trainer."""

from __future__ import annotations

from typing import Any

from nemo.collections.llm.gpt.model.base import GPTModel

from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.nemo import build
from nemo_rao.mcore.finish import finish_chunk, finish_config
from nemo_rao.objectives.base import Needs


def chunks(config: RunConfig, needs: Needs, *, is_trained: bool) -> list[Any]:
    """See :meth:`nemo_rao.engines.engine.Engine.second_model`."""
    stages = config.model.virtual_pipeline_model_parallel_size
    return [_chunk(config, needs, is_trained, stage) for stage in ([None] if stages is None else range(stages))]


def _chunk(config: RunConfig, needs: Needs, is_trained: bool, virtual_stage: int | None) -> Any:
    made = build.model_config(config)
    finish_config(made, fp8_simulation=None)
    model = GPTModel(made, tokenizer=build.tokenizer(config))
    # Like a trainer: the strategy writes parallel sizes and number formats to the model's config.
    strategy = build.strategy(config)
    strategy.precision_plugin = build.precision(config)
    strategy.connect(model)
    model.config.perform_initialization = is_trained
    model.configure_model(**({} if virtual_stage is None else {"vp_stage": virtual_stage}))
    finish_chunk(
        model.module,
        needs,
        fused_log_probs=config.model.fused_log_probs,
        head_seed=config.trainer.seed,
        fp8_is_simulated=False,
    )
    return strategy.precision_plugin.convert_module(model).module.cuda().eval()
