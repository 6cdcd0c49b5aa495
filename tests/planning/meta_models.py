"""Megatron's own models, buffers and optimizer on the meta device: shapes and bytes of any rank, without memory.

Process groups are PyTorch's fake ones, in which one process takes the place of any rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_rao.config.derived import world_size
from nemo_rao.config.run_config import RunConfig

from ..engine_models import gpt, megatron_configs


class OnMeta(TorchFunctionMode):
    """Every tensor that is made is made on the meta device, whichever is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron determines the precision of a parameter from its type name on a GPU.
            return {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}[args[0].dtype]
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def ranks_of(config: RunConfig, tokens: int) -> dict[tuple[int, int, int], dict[str, Any]]:
    """(pipeline, tensor, shard) rank -> its parameters' names and sizes, bytes of weights, gradients, optimizer.

    A shard is a data- or context-parallel rank. Of every stage, all shards of the first tensor-parallel rank, and the
    last tensor-parallel rank.
    """
    found = {}
    for rank in range(world_size(config)):
        _enter(config, rank)
        try:
            stage, tensor, shard = _place()
            if tensor == 0 or (tensor == config.model.tensor_model_parallel_size - 1 and shard == 0):
                found[stage, tensor, shard] = _measure(config, tokens)
        finally:
            _leave()
    return found


def _enter(config: RunConfig, rank: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def everyone_has(gathered: list[Any], own: Any, **_: Any) -> None:  # its sizes would be tensors without values
        gathered[:] = [own] * len(gathered)

    torch.distributed.all_gather_object = everyone_has
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size(config), store=FakeStore())
    parallel_state.initialize_model_parallel(
        config.model.tensor_model_parallel_size,
        config.model.pipeline_model_parallel_size,
        config.model.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.model.context_parallel_size,
        expert_model_parallel_size=config.model.expert_model_parallel_size,
        expert_tensor_parallel_size=config.model.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _place() -> tuple[int, int, int]:
    from megatron.core import parallel_state as state

    return (
        state.get_pipeline_model_parallel_rank(),
        state.get_tensor_model_parallel_rank(),
        state.get_data_parallel_rank(with_context_parallel=True),
    )


def _measure(config: RunConfig, tokens: int) -> dict[str, Any]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import get_megatron_optimizer

    from nemo_rao.mcore.torch_adam import allocate_state

    with torch.device("meta"), OnMeta():
        virtual = config.model.virtual_pipeline_model_parallel_size
        made, options, buffering = megatron_configs(config)
        made.perform_initialization = False
        chunks = [gpt(config, made, tokens, chunk) for chunk in (range(virtual) if virtual else (None,))]
        parameters = [named for model in chunks for named in model.named_parameters()]
        frozen = sum(_bytes(parameter) for _, parameter in parameters if not parameter.requires_grad)
        trained = sum(_bytes(parameter) for _, parameter in parameters if parameter.requires_grad)
        wrapped = [
            DistributedDataParallel(model.config, buffering, model, disable_bucketing=number > 0)
            for number, model in enumerate(chunks)
        ]
        buffers = [buffer for model in wrapped for buffer in (*model.buffers, *model.expert_parallel_buffers)]
        optimizer = get_megatron_optimizer(options, wrapped, use_gloo_process_groups=False)
        state = 0
        for part in optimizer.chained_optimizers:
            adam = part.optimizer
            allocate_state(adam)
            for group in adam.param_groups:
                for main in group["params"]:
                    state += _bytes(adam.state[main]["exp_avg"]) + _bytes(adam.state[main]["exp_avg_sq"])
                    if options.bf16:  # copies; in fp32 they are views of the weights
                        state += _bytes(main)
        buffered = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        return {
            "sizes": [(name, parameter.numel()) for name, parameter in parameters],
            "weights": frozen + (sum(map(_bytes, buffered)) if buffered else trained),
            "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
            "optimizer": state,
        }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
