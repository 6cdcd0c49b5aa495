"""A recipe's model as each rank builds it on the installed engine: shapes without memory.

One process plays any rank of the recipe at full size, with PyTorch's fake process group, on the meta device. Megatron's
numbering determines which ranks hold different parts: tensor-parallel ranks are adjacent, then context- and
data-parallel ones, pipeline stages last; within a stage, ranks that split an expert are adjacent, then those that share
the experts. Data- and context-parallel ranks are copies, except for their experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from nemo_rao.config.derived import objective_config, world_size
from nemo_rao.config.run_config import RunConfig

from ..engine_models import add_adapters, gpt, megatron_configs
from ..engines import ENGINE, NEMO
from ..planning.meta_models import OnMeta

NUM_TOKENS = 1000  # of a tokenizer: as the recipe names the vocabulary's size, it must not matter


class Part(NamedTuple):
    """A pipeline stage's ranks that hold the same: ``of_expert`` is the rank among those that split an expert."""

    stage: int
    tensor: int
    expert: int
    of_expert: int


def parts_of(config: RunConfig) -> dict[Part, int]:
    """Every distinct part of the model, and the first rank that holds it."""
    keys, found = config.model, {}
    ranks_of_stage = world_size(config) // keys.pipeline_model_parallel_size
    of_expert = keys.expert_tensor_parallel_size or keys.tensor_model_parallel_size
    for rank in range(world_size(config)):
        stage, location = divmod(rank, ranks_of_stage)
        expert = location // of_expert % keys.expert_model_parallel_size
        part = Part(stage, location % keys.tensor_model_parallel_size, expert, location % of_expert)
        found.setdefault(part, rank)
    return found


def build_parts(config: RunConfig) -> dict[Part, list[dict[str, Any]]]:
    """For each part, of each of its chunks: numbers of its layers, and its parameters' names and sizes."""
    return {part: _as_rank(config, part, rank) for part, rank in parts_of(config).items()}


def _as_rank(config: RunConfig, part: Part, rank: int) -> list[dict[str, Any]]:
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    keys = config.model
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size(config), store=FakeStore())
    try:
        state.initialize_model_parallel(
            keys.tensor_model_parallel_size,
            keys.pipeline_model_parallel_size,
            keys.virtual_pipeline_model_parallel_size,
            context_parallel_size=keys.context_parallel_size,
            expert_model_parallel_size=keys.expert_model_parallel_size,
            expert_tensor_parallel_size=keys.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)
        assert part == (
            state.get_pipeline_model_parallel_rank(),
            state.get_tensor_model_parallel_rank(),
            state.get_expert_model_parallel_rank(),
            state.get_expert_tensor_parallel_rank(),
        )
        virtual = keys.virtual_pipeline_model_parallel_size
        with torch.device("meta"), OnMeta():
            return [_chunk(config, chunk) for chunk in (range(virtual) if virtual else (None,))]
    finally:
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _chunk(config: RunConfig, chunk: int | None) -> dict[str, Any]:
    model, more = _of_nemo(config, chunk) if ENGINE == NEMO else (_of_bridge(config, chunk), {})
    return {
        **more,
        "layers": [layer.layer_number for layer in model.decoder.layers],
        "parameters": [(name, parameter.numel()) for name, parameter in model.named_parameters()],
    }


def _of_nemo(config: RunConfig, chunk: int | None) -> tuple[Any, dict[str, Any]]:
    """The network within this project's model, and how that has kept the objective's keys."""
    from nemo_rao.engines.nemo import build
    from nemo_rao.engines.nemo.model import MegatronGPTAlignmentModel

    keys = objective_config(config)
    model = MegatronGPTAlignmentModel(
        build.model_config(config),
        objective=config.model.objective,
        objective_config=keys,
        tokenizer=SimpleNamespace(vocab_size=NUM_TOKENS),
        model_transform=build.lora(config),
        fused_log_probs=config.model.fused_log_probs,
    )
    strategy = build.strategy(config)
    strategy.precision_plugin = build.precision(config)
    strategy.connect(model)
    model.configure_model(vp_stage=chunk)
    add_adapters(model.module, config)
    kept = type(model.__io__.objective_config)
    return model.module, {"loss has the recipe's keys": model.loss.config is keys, "kept for checkpoints": kept}


def _of_bridge(config: RunConfig, chunk: int | None) -> Any:
    return gpt(config, megatron_configs(config)[0], NUM_TOKENS, chunk, fused=config.model.fused_log_probs)
