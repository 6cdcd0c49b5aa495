"""Micro-batches through the pipeline: one stage's step, and a forward-only pass over many."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.data.prefetch import Prefetcher
from nemo_rao.mcore.attention import segment_kwargs
from nemo_rao.mcore.heads import SCORE_HEAD, VALUE_HEAD
from nemo_rao.mcore.output_layer import output_layer_input, unfuse_adapted_output_layer
from nemo_rao.mcore.quantization import quantization_kept


def made_ahead(batches: Iterable[MicroBatch]) -> Prefetcher[MicroBatch]:
    """Collate micro-batches on a thread; with a GPU, in page-locked memory, so that copies are asynchronous."""
    return Prefetcher(_page_locked(batches, torch.cuda.current_device()) if torch.cuda.is_available() else batches)


def _page_locked(batches: Iterable[MicroBatch], device: int) -> Iterator[MicroBatch]:
    # The current device is per thread; the default would create a context on the first GPU.
    torch.cuda.set_device(device)
    for batch in batches:
        yield _each_tensor(batch, Tensor.pin_memory)


def to_device(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with its tensors on this rank's device."""
    if not torch.cuda.is_available():
        return batch
    return _each_tensor(batch, lambda tensor: tensor.cuda(non_blocking=True))


def _each_tensor(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    tensors: dict[str, Any] = {
        field.name: change(value)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    of_tokens = {name: change(values) for name, values in batch.of_tokens.items()}
    return dataclasses.replace(batch, **tensors, of_tokens=of_tokens)


def forward_step(model: Any, batch: MicroBatch) -> Tensor | ModelOutput:
    """Run a model chunk on a micro-batch.

    Sequences are padded on the right and attention is causal, so real tokens never see padding: separate rows need no
    mask, with or without Transformer Engine. Segments are passed to the attention layers
    (:mod:`nemo_rao.mcore.attention`).

    Args:
        model: a Megatron GPT model chunk, or a wrapper that calls one with the same arguments.

    Returns:
        the model's output on the last pipeline stage, hidden states ``[T, B, hidden]`` on earlier ones.
    """
    inner = unwrapped(model)
    unfuse_adapted_output_layer(inner)
    with segment_kwargs(inner, batch) as arguments:
        output = model(input_ids=batch.tokens, position_ids=batch.position_ids, labels=None, **arguments)
    if not inner.post_process:
        return output
    if (head := getattr(inner, SCORE_HEAD, None)) is not None:
        return ModelOutput(logits=None, scores=head(batch))
    head = getattr(inner, VALUE_HEAD, None)
    values = None if head is None else head(batch)[..., 0]
    if head is not None and head.alone:
        return ModelOutput(logits=None, values=values)
    if (fused := output_layer_input(inner)) is not None:
        return ModelOutput(logits=None, hidden=fused[0], output_weight=fused[1], values=values)
    return ModelOutput(logits=output, values=values)


def unwrapped(model: Any) -> Any:
    """Return the Megatron model inside its wrappers: distributed data parallel, 16 bits, NeMo's."""
    while hasattr(model, "module"):
        model = model.module
    return model


@contextlib.contextmanager
def evaluation_mode(model: Sequence[Any]) -> Iterator[None]:
    """Disable dropout and gradients; the mode and amax histories of every chunk are restored afterwards."""
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad(), quantization_kept(model):
            yield
    finally:
        for chunk, training in zip(model, was_training, strict=True):
            chunk.train(training)


def forward_only(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    report: Callable[[ModelOutput, MicroBatch], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Run micro-batches through the pipeline without a backward pass. A collective of the model-parallel group.

    Data-parallel ranks may have different numbers of micro-batches, or none. If they split experts, it is a collective
    over all of them, because each expert's rank must process the others' tokens. Call it inside
    :func:`evaluation_mode`.

    Args:
        model: this rank's model chunks.
        micro_batches: prompt indices of each micro-batch.
        make_micro_batch: prompt indices -> micro-batch.
        report: (output, micro-batch) -> result; called on the last pipeline stage.

    Returns:
        one result per micro-batch on the last pipeline stage, an empty list on earlier ones.
    """
    num_wanted, num_run = len(micro_batches), _num_run(len(micro_batches), num_chunks=len(model))
    if num_run == 0:
        return []
    # The last one (on ranks without any, the data's first prompt) is run again, and its result is dropped.
    filling = micro_batches[-1] if micro_batches else [0]
    micro_batches = [*micro_batches, *[filling] * (num_run - num_wanted)]

    def forward(data_iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor | ModelOutput, Callable]:
        batch = to_device(next(data_iterator))

        def no_loss(output: ModelOutput) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            nothing = torch.zeros((), device=batch.tokens.device)
            return nothing, nothing.int(), report(output, batch)

        return forward_step(chunk, batch), no_loss

    reports = _run_schedule(model, micro_batches, forward, make_micro_batch=make_micro_batch, forward_only=True)
    return reports[:num_wanted]


def forward_backward(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    loss: Callable[[ModelOutput, MicroBatch], tuple[Tensor, Tensor, dict[str, Tensor]]],
) -> None:
    """Accumulate micro-batches' gradients, reduced over ranks and divided by the count that the loss reports.

    A collective over all ranks, which must have equally many micro-batches.

    Args:
        model: this rank's chunks, wrapped by megatron-core's distributed data parallel.
        micro_batches: prompt indices of each micro-batch.
        make_micro_batch: prompt indices -> micro-batch.
        loss: loss of the last stage's output; see :func:`nemo_rao.mcore.loss.for_schedule`.
    """

    def forward(data_iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor | ModelOutput, Callable]:
        batch = to_device(next(data_iterator))
        return forward_step(chunk, batch), lambda output: loss(output, batch)

    _run_schedule(model, micro_batches, forward, make_micro_batch=make_micro_batch, forward_only=False)


def _run_schedule(
    model: Sequence[Any],
    micro_batches: Sequence[Sequence[int]],
    forward: Callable[[Iterator[MicroBatch], Any], tuple[Tensor | ModelOutput, Callable]],
    *,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """Run Megatron's schedule over these micro-batches and return its result."""
    with contextlib.ExitStack() as threads:
        iterators = [threads.enter_context(made_ahead(map(make_micro_batch, micro_batches))) for _ in model]
        reports: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=1,  # unused: shapes are communicated per micro-batch (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return reports


def _num_run(num_wanted: int, *, num_chunks: int) -> int:
    """Return the number of micro-batches that this rank must run to cover ``num_wanted``."""
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        most = torch.tensor(num_wanted, device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
        torch.distributed.all_reduce(
            most, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_data_parallel_group()
        )
        num_wanted = int(most)
    # Interleaved schedules require a multiple of the pipeline's size.
    multiple = parallel_state.get_pipeline_model_parallel_world_size() if num_chunks > 1 else 1
    return -(-num_wanted // multiple) * multiple
