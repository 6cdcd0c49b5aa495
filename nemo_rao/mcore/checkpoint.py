"""Megatron's distributed checkpoints (``torch_dist``): write and read a rank's part of model and optimizer.

The model's tensors have NeMo's names, with the prefix "module.", so that a checkpoint of either engine can start a run
of the other; names without the prefix, as written by Megatron-Bridge itself, can be read, too. The optimizer state is
stored in the format that any parallelism can load; other state of a run consists of plain types.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy, load_sharded_metadata
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from packaging.version import Version

from nemo_rao.mcore import torch_adam
from nemo_rao.mcore.forward import unwrapped
from nemo_rao.mcore.heads import heads

PREFIX = "module."  # prefix of NeMo's names
STATE = "nemo_rao"
COMMON = "common.pt"
# Layout of the optimizer state: loadable under any parallelism, and the only layout for torch's Adam. Before
# megatron-core 0.15 the layout for any parallelism is that of the model's space.
_SINCE_0_15 = Version(megatron.core.__version__) >= Version("0.15")
_LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable" if _SINCE_0_15 else "fully_sharded_model_space",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

Filter = Callable[[str], bool]


def sharded_model(chunks: Sequence[Any], *, prefix: str = "", keep: Filter | None = None) -> dict[str, Any]:
    """Return the model's sharded state dict, one entry per chunk.

    Args:
        prefix: prefix of the names in the checkpoint.
        keep: whether to include the tensor with this name, on this rank; ``None``: all.
    """
    state = {}
    for number, chunk in enumerate(chunks):
        tensors = unwrapped(chunk).sharded_state_dict(metadata=dict(_LAYOUT))
        tensors = {name: value for name, value in tensors.items() if keep is None or keep(name)}
        if prefix:
            add_prefix_for_sharding(tensors, prefix)
        state["model" if len(chunks) == 1 else f"model{number}"] = tensors
    return state


def save(
    folder: Path,
    chunks: Sequence[Any],
    optimizer: Any,
    state: Mapping[str, Any],
    *,
    keep: Filter | None,
    in_background: bool = False,
) -> Any:
    """Write model and optimizer. A collective over all ranks.

    Args:
        folder: directory to create; it must not be read before this returns on every rank.
        state: plain types, the same on every rank.
        keep: see :func:`sharded_model`.
        in_background: only prepare the writing.

    Returns:
        ``None``; or Megatron's request for the writing, for :class:`BackgroundWriter`.
    """
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    content = sharded_model(chunks, prefix=PREFIX, keep=keep)
    content["optimizer"] = optimizer.sharded_state_dict(content, metadata=dict(_LAYOUT))
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_save_sharded_strategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    content |= {STATE: dict(state)}
    how: dict[str, Any] = {"async_sharded_save": in_background, "content_metadata": dict(_LAYOUT)}
    if in_background and "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        how["async_strategy"] = "mcore"  # the default needs another package
    request = dist_checkpointing.save(content, str(folder), strategy, **how)

    def finish() -> None:
        if torch.distributed.get_rank() == 0:
            write_common(folder)
        torch.distributed.barrier()

    if request is None:
        finish()
    else:
        request.add_finalize_fn(finish)
    return request


class BackgroundWriter:
    """Writes checkpoints in the background: one process per rank, after the rank has copied them to host memory."""

    def __init__(self) -> None:
        self._calls = AsyncCallsQueue()

    def schedule(self, request: Any, finish: Callable[[], None]) -> None:
        """Start writing what :func:`save` has prepared. A collective of all ranks, like all methods.

        Args:
            finish: called on every rank once all of them have written their part.
        """
        request.add_finalize_fn(finish)
        self._calls.schedule_async_request(request)

    def finish_written(self, *, wait: bool) -> None:
        """Finish the checkpoints that all ranks have written; ``wait``: all of them."""
        if self._calls.get_num_unfinalized_calls():
            self._calls.maybe_finalize_async_calls(blocking=wait)


def write_common(folder: Path) -> None:
    """Write the non-tensor state of a complete checkpoint as ``common.pt`` if it is missing. On one rank.

    megatron-core 0.19 stores it among the tensors, but earlier releases, including NeMo's, cannot read a checkpoint
    without the file. Newer ones read the file first.
    """
    if not (folder / COMMON).exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / COMMON)


def load(folder: Path, chunks: Sequence[Any], optimizer: Any, *, keep: Filter | None) -> Mapping[str, Any]:
    """Load model and optimizer written by :func:`save`, under any parallelism; return ``state``.

    The optimizer keeps its current hyperparameters.
    """
    content = _request(folder, chunks, keep)
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    with_torch_adam = [part for part in optimizer_parts(optimizer) if torch_adam.is_torch_adam(part)]
    for part in with_torch_adam:
        torch_adam.before_reading(part)
    content["optimizer"] = optimizer.sharded_state_dict(content, is_loading=True, metadata=dict(_LAYOUT))
    loaded = dist_checkpointing.load(content, str(folder))
    _take(chunks, loaded)
    optimizer.load_state_dict(_for_parts(optimizer, loaded["optimizer"], folder))
    for part in with_torch_adam:
        torch_adam.after_reading(part)
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
    return loaded[STATE]  # type: ignore[no-any-return]


def load_weights(folder: Path, chunks: Sequence[Any], optimizer: Any = None, *, keep: Filter | None = None) -> None:
    """Load only a model's weights, from a checkpoint of either engine.

    A head that is missing, or has another size, keeps its current values.

    Args:
        optimizer: optimizer whose copies of the weights are updated, too.
    """
    _take(chunks, dist_checkpointing.load(_request(folder, chunks, keep), str(folder)))
    if optimizer is not None:
        optimizer.reload_model_params()


def _request(folder: Path, chunks: Sequence[Any], keep: Filter | None) -> dict[str, Any]:
    """Return what to read from a checkpoint for these chunks, under the checkpoint's names."""
    stored = {name: tensor.global_shape for name, tensor in load_tensors_metadata(str(folder)).items()}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    with _stored_heads(chunks, stored):
        content = sharded_model(chunks, prefix=prefix, keep=keep)
    known = None
    for tensors in content.values():
        # Extra state of Transformer Engine's layers, which the checkpoint may lack.
        objects = [name for name, value in tensors.items() if isinstance(value, ShardedObject)]
        if objects and known is None:
            known = {key.key for key in load_sharded_metadata(str(folder)).values()}
        for name in objects:
            if name.endswith("_extra_state") and tensors[name].key not in (known or ()):
                del tensors[name]
    return content


@contextlib.contextmanager
def _stored_heads(chunks: Sequence[Any], stored: Mapping[str, Any]) -> Iterator[None]:
    found = [head for chunk in chunks for head in heads(chunk)]
    for head in found:
        head.look_for(stored)
    try:
        yield
    finally:
        for head in found:
            head.stored = head.name


def _take(chunks: Sequence[Any], loaded: Mapping[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        tensors = loaded["model" if len(chunks) == 1 else f"model{number}"]
        result = unwrapped(chunk).load_state_dict(tensors, strict=False)
        if result.unexpected_keys:
            logging.getLogger(__name__).warning("not read: %s", result.unexpected_keys)


def _for_parts(optimizer: Any, loaded: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    """Convert the loaded state of an optimizer to what its parts expect.

    Split experts are a separate part, whose tensors have the same names. A checkpoint of other parts differs in the
    remaining state: number of steps and loss scale, equal in all parts, and hyperparameters.
    """
    common = dist_checkpointing.load_common_state_dict(str(folder))["optimizer"]
    # State of one part; in fp32 without the distributed optimizer, that of torch's optimizer.
    is_one = "optimizer" in common or "param_groups" in common
    stored, parts = [common] if is_one else list(common.values()), optimizer_parts(optimizer)
    if len(stored) == len(parts):
        return loaded
    given = {name: value for name, value in stored[0].items() if name != "optimizer"}
    step = stored[0]["optimizer"]["param_groups"][0]["step"]
    states = []
    for number, part in enumerate(parts):
        own, tensors = part.state_dict(), loaded if len(parts) == 1 else loaded[number]
        for group in own["optimizer"]["param_groups"]:
            group["step"] = step
        states.append({**own, **given, "param_state": tensors["param_state"]})
    return states[0] if len(parts) == 1 else dict(enumerate(states))


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Return the optimizers inside a megatron-core optimizer, each for some of the parameters."""
    chained = vars(optimizer).get("chained_optimizers")
    return [optimizer] if chained is None else [part for one in chained for part in optimizer_parts(one)]
