"""A second model that a run trains on the policy's ranks, with its optimizer, steps and checkpoints.

Built from megatron-core's distributed data parallel, schedules, optimizers and checkpoints. With GPUs, weights,
optimizer state and gradient buffers are on the device only while they are used; weights and optimizer state are in
host memory otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore import checkpoint, torch_adam
from nemo_rao.mcore.forward import forward_backward
from nemo_rao.mcore.host_memory import HostMemory, on_gpu

# Communication is not overlapped with computation: weights must be gathered before they are moved to the host.
_NOT_OVERLAPPED = {"overlap_grad_reduce": False, "overlap_param_gather": False}


class TrainedModel:
    """This rank's part of a second model.

    Args:
        chunks: model chunks with weights, on the device, not wrapped for training.
        gradients: fields of megatron-core's ``DistributedDataParallelConfig``.
        optimizer: fields of its ``OptimizerConfig``.

    Attributes:
        chunks: chunks for Megatron's schedules; use them only inside :meth:`on_device`.
    """

    def __init__(self, chunks: Sequence[Any], *, gradients: Mapping[str, Any], optimizer: Mapping[str, Any]) -> None:
        how = DistributedDataParallelConfig(**{**gradients, **_NOT_OVERLAPPED})
        self.chunks: Sequence[Any] = [
            DistributedDataParallel(get_model_config(chunk), how, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        self._optimizer = get_megatron_optimizer(OptimizerConfig(**{**optimizer, "min_lr": 0.0}), list(self.chunks))
        for chunk in self.chunks:
            config = get_model_config(chunk)
            config.finalize_model_grads_func = finalize_model_grads
            config.grad_scale_func = self._optimizer.scale_loss
        for part in checkpoint.optimizer_parts(self._optimizer):
            if torch_adam.is_torch_adam(part):
                torch_adam.allocate_state(part.optimizer)  # checkpoints contain it, even if fp16 skips all steps
        for group in self._optimizer.param_groups:
            group["weight_decay"] = optimizer["weight_decay"] * group.get("wd_mult", 1.0)
            if "max_lr" in group:
                group["max_lr"] = 1.0  # checkpoints identify a group by it, and it may change when a run resumes
        self._weights = HostMemory(lambda: on_gpu(_weights(self.chunks)))
        self._states = HostMemory(lambda: on_gpu(_states(self._optimizer, self.chunks)))
        self._gradients = HostMemory(lambda: on_gpu(_gradients(self.chunks)), kept=False)
        for part in (self._gradients, self._states, self._weights):
            part.send_away()

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights on the device inside the block, for forward passes."""
        return self._weights.on_device(changed=False)

    @contextlib.contextmanager
    def _all_on_device(self, *, changed: bool) -> Iterator[None]:
        with (
            self._weights.on_device(changed=changed),
            self._states.on_device(changed=changed),
            self._gradients.on_device(changed=True),
        ):
            yield

    def step(
        self,
        micro_batches: Sequence[Sequence[int]],
        *,
        make_micro_batch: Callable[[Sequence[int]], MicroBatch],
        loss: Callable[[ModelOutput, MicroBatch], tuple[Tensor, Tensor, dict[str, Tensor]]],
        rate: float,
    ) -> float | None:
        """Take an optimizer step. A collective over all ranks, which must have equally many micro-batches.

        Args:
            micro_batches: slots of each of this rank's micro-batches.
            make_micro_batch: slots -> micro-batch.
            loss: loss of the last stage's output, see :func:`nemo_rao.mcore.loss.for_schedule`.
            rate: learning rate.

        Returns:
            the gradient norm before clipping; ``None`` if it was not finite in fp16 and the step was skipped.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with self._all_on_device(changed=True):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            forward_backward(self.chunks, micro_batches, make_micro_batch=make_micro_batch, loss=loss)
            _, norm, _ = self._optimizer.step()
            self._optimizer.zero_grad()  # also frees the optimizer's fp32 copies
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer. A collective over all ranks; see :func:`nemo_rao.mcore.checkpoint.save`."""
        with self._all_on_device(changed=False):
            checkpoint.save(folder, self.chunks, self._optimizer, {}, keep=None)

    def load(self, folder: Path) -> None:
        """Load what :meth:`save` has written, under any parallelism."""
        with self._all_on_device(changed=True):
            checkpoint.load(folder, self.chunks, self._optimizer, keep=None)


def _weights(chunks: Sequence[Any]) -> Iterator[Tensor]:
    for chunk in chunks:
        for parameter in chunk.parameters():
            yield parameter.data


def _gradients(chunks: Sequence[Any]) -> Iterator[Tensor]:
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                yield parameter.main_grad


def _states(optimizer: Any, chunks: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the optimizer's copies of weights, and its moments."""
    of_weights = {tensor.untyped_storage()._cdata for tensor in _weights(chunks)}
    for part in checkpoint.optimizer_parts(optimizer):
        if part.optimizer is None:  # this rank has no such parameters
            continue
        own = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        own += [value for state in part.optimizer.state.values() for value in state.values()]
        for tensor in own:
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in of_weights:
                yield tensor
