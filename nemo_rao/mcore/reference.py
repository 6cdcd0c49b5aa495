"""Numbers of every response of a data set from one forward-only pass, cached on disk; mainly reference log-probs.

The reference is the policy before its first step and enters a loss only through two sums per response. They are
computed once, under the parallelism of the training run, and read by every later epoch, resumed run, and run that
starts from the same weights. No second copy of the model is held.

On disk, in the cache directory::

    <key>/part-<writer>-<number>.npz   response indices and their sums, while a pass is running
    <key>/sums.npy                     [responses, W] float32, when it is complete; W = 2 for the reference

Every file is written under a temporary name first. An interrupted pass resumes with what its parts lack, under any
parallelism.

Several runs may compute the same numbers concurrently, on a file system without reliable locks: each writes parts under
unique names, overwrites no other's, and merges what it has in memory. Parts only serve a successor; once ``sums.npy``
exists they may vanish at any time.
"""

from __future__ import annotations

import hashlib
import secrets
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.mcore.forward import evaluation_mode, forward_only
from nemo_rao.mcore.loss import sequence_log_probs
from nemo_rao.runtime.files import written_atomically

_FORMAT = "reference-sums-2"
_SUMS = "sums.npy"


def reference_key(*, weights: str, network: str, data: str, precision: str) -> str:
    """Return the cache key of a reference pass, from everything that its numbers depend on.

    Args:
        weights: see :func:`nemo_rao.mcore.fingerprint.weights_fingerprint`.
        network: what they compute, see :func:`nemo_rao.mcore.network.network_fingerprint`.
        data: fingerprint of the tokenized rows.
        precision: number formats, scales included.
    """
    return hashlib.sha256("|".join((_FORMAT, weights, network, data, precision)).encode()).hexdigest()[:32]


def earlier_reference_key(*, weights: str, data: str, precision: str) -> str:
    """Return the key of earlier versions for the same numbers; their checkpoints do not record the network."""
    return hashlib.sha256("|".join(("reference-sums-1", weights, data, precision)).encode()).hexdigest()[:32]


def load_numbers(cache_dir: Path, key: str, num_responses: int, width: int) -> np.ndarray | None:
    """Return the complete numbers ``[responses, width]`` float32, memory-mapped, or ``None``."""
    path = cache_dir / key / _SUMS
    if not path.exists():
        return None
    sums = np.load(path, mmap_mode="r", allow_pickle=False)
    assert sums.shape == (num_responses, width), (path, sums.shape, num_responses)
    return sums


def load_reference(cache_dir: Path, key: str, num_responses: int) -> np.ndarray | None:
    """Return the complete sums ``[responses, 2]`` float32 (prompt without t0, response; nats), or ``None``."""
    return load_numbers(cache_dir, key, num_responses, 2)


def compute_reference(model: Sequence[Any], *, vocab_size: int, **arguments: Any) -> np.ndarray:
    """Compute, or read from the cache, the reference log-probs of a data set. A collective over all ranks.

    Args:
        model: this rank's model chunks, holding the reference weights; their mode is preserved.
        vocab_size: V without padding.
        arguments: see :func:`compute_numbers`.

    Returns:
        ``[responses, 2]`` float32: prompt sum without t0, response sum; nats. Memory-mapped, read-only.
    """

    def sums(output: ModelOutput, batch: MicroBatch) -> Tensor:
        return torch.stack(sequence_log_probs(output, batch, vocab_size=vocab_size), dim=-1)

    return compute_numbers(model, numbers=sums, width=2, **arguments)


def compute_numbers(
    model: Sequence[Any],
    *,
    numbers: Callable[[ModelOutput, MicroBatch], Tensor],
    width: int,
    prompts: Sequence[Sequence[int]],
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    micro_batch_size: int,
    micro_batches_per_part: int,
    cache_dir: Path,
    key: str,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Compute, or read from the cache, numbers of every response. A collective over all ranks.

    Args:
        model: this rank's model chunks; their mode is preserved.
        numbers: (output, micro-batch) -> ``[R, width]``; called on the last pipeline stage.
        prompts: for each prompt, the indices of its responses.
        make_micro_batch: prompt indices -> micro-batch.
        micro_batch_size: prompts in a micro-batch.
        micro_batches_per_part: micro-batches between writes; at most these are lost if the pass is interrupted.
        cache_dir: a directory shared by all ranks.
        key: key of what the numbers depend on, such as :func:`reference_key`.
        progress: called with (prompts done, total prompts) on every rank, about this rank's share.

    Returns:
        ``[responses, width]`` float32. Memory-mapped, read-only.
    """
    num_responses = sum(len(responses) for responses in prompts)
    folder = cache_dir / key
    if not _is_complete(cache_dir, key, num_responses, width):
        known, remaining = _begin(folder, prompts, num_responses, width)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine, longest = remaining[rank::size], -(-len(remaining) // size)
        parts = _Parts(folder, writes=parallel_state.get_tensor_and_context_parallel_rank() == 0)
        computed = np.full((num_responses, width), np.nan, dtype=np.float32)
        covered = np.zeros(num_responses, dtype=bool)
        for done, responses, sums in _sums_of(
            model, mine, longest, make_micro_batch, micro_batch_size, micro_batches_per_part, numbers, width
        ):
            if parts.add(responses, sums):
                computed[responses], covered[responses] = sums, True
            if progress is not None:
                progress(done, len(mine))
        _finish(folder, known, _over_ranks(computed, covered))
    elif torch.distributed.get_rank() == 0:
        _remove_parts(folder)  # left by runs that were killed after another had finished
    finished = load_numbers(cache_dir, key, num_responses, width)
    assert finished is not None, f"{folder} must be shared by all ranks"
    return finished


def _is_complete(cache_dir: Path, key: str, num_responses: int, width: int) -> bool:
    """Whether the numbers are already on disk, as seen by rank 0."""
    complete = [torch.distributed.get_rank() == 0 and load_numbers(cache_dir, key, num_responses, width) is not None]
    torch.distributed.broadcast_object_list(complete, src=0)
    return complete[0]


def _begin(
    folder: Path, prompts: Sequence[Sequence[int]], num_responses: int, width: int
) -> tuple[np.ndarray | None, list[int]]:
    """Return the contents of parts, only on rank 0, and the prompts that they do not cover, on every rank."""
    known, remaining = None, [[0]]
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_parts(folder, num_responses, width)
        present = np.isfinite(known).all(axis=1)
        remaining = [[i for i, responses in enumerate(prompts) if not present[list(responses)].all()]]
    torch.distributed.broadcast_object_list(remaining, src=0)
    return known, remaining[0]


def _over_ranks(computed: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gather all ranks' numbers ``[responses, width]``, and which of them exist ``[responses]``. A collective.

    Data-parallel ranks have different responses, and one rank of each model-parallel group contributes them.
    """
    columns = np.concatenate([np.where(covered[:, None], computed, 0), covered[:, None]], axis=1, dtype=np.float32)
    total = torch.from_numpy(columns)
    if torch.cuda.is_available():
        total = total.cuda()
    torch.distributed.all_reduce(total)
    columns = total.cpu().numpy()
    return columns[:, :-1], columns[:, -1] > 0


def _finish(folder: Path, known: np.ndarray | None, computed: tuple[np.ndarray, np.ndarray]) -> None:
    """Write the numbers from rank 0's memory, unless another run was faster. A collective.

    Raises:
        FloatingPointError: some of them are not finite.
    """
    missing: list[int] = [0]
    if known is not None:
        sums = np.where(computed[1][:, None], computed[0], known)
        missing = [int((~np.isfinite(sums)).any(axis=1).sum())]
        if missing == [0]:
            if not (folder / _SUMS).exists():  # otherwise readers have it memory-mapped
                with written_atomically(folder / _SUMS) as (file,):
                    np.save(file, sums)
            _remove_parts(folder)
    torch.distributed.broadcast_object_list(missing, src=0)  # also a barrier: no rank reads before it is written
    if missing != [0]:
        raise FloatingPointError(f"the model's outputs for {missing[0]} of {len(computed[1])} responses are not finite")


def _sums_of(
    model: Sequence[Any],
    prompts: Sequence[int],
    longest: int,
    make_micro_batch: Callable[[Sequence[int]], MicroBatch],
    micro_batch_size: int,
    micro_batches_per_part: int,
    numbers: Callable[[ModelOutput, MicroBatch], Tensor],
    width: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield part by part: prompts done, response indices ``[n]``, sums ``[n, width]``; n = 0 before the last stage.

    ``longest``: prompts of the rank that has most. All ranks take part in equally many parts: they may split experts.
    """

    def report(output: ModelOutput, batch: MicroBatch) -> dict[str, Tensor]:
        return {"responses": batch.response_ids, "sums": numbers(output, batch)}

    per_part = micro_batch_size * micro_batches_per_part
    with evaluation_mode(model):
        for start in range(0, longest, per_part):
            part = prompts[start : start + per_part]
            micro_batches = [part[i : i + micro_batch_size] for i in range(0, len(part), micro_batch_size)]
            outputs = forward_only(model, micro_batches, make_micro_batch=make_micro_batch, report=report)
            responses = [output["responses"].cpu().numpy() for output in outputs]
            sums = [output["sums"].float().cpu().numpy() for output in outputs]
            yield (
                min(start + len(part), len(prompts)),
                np.concatenate([np.zeros(0, np.int64), *responses]),
                np.concatenate([np.zeros((0, width), np.float32), *sums]),
            )


# ----------------------------------------------------------------------------------------------- files


class _Parts:
    """The parts that this rank has written so far.

    Args:
        folder: directory of the pass.
        writes: whether this rank writes for its tensor- and context-parallel group.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._writer = secrets.token_hex(8)  # random: processes of several nodes and jobs write to one directory
        self._count = 0

    def add(self, responses: np.ndarray, sums: np.ndarray) -> bool:
        """Write one part: response indices ``[n]`` and sums ``[n, width]``. Return whether this rank writes."""
        if not self._writes or not len(responses):
            return False
        with written_atomically(self._folder / f"part-{self._writer}-{self._count}.npz") as (file,):
            np.savez(file, responses=responses, sums=sums)
        self._count += 1
        return True


def _read_parts(folder: Path, num_responses: int, width: int) -> np.ndarray:
    """Read ``[responses, width]`` float32, NaN if no part has the response. Unreadable parts count as absent."""
    sums = np.full((num_responses, width), np.nan, dtype=np.float32)
    for path in sorted(folder.glob("part-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                sums[part["responses"]] = part["sums"]
        except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
            continue  # damaged, or removed meanwhile by another run that finished
    return sums


def _remove_parts(folder: Path) -> None:
    for path in folder.glob("part-*.npz"):
        path.unlink(missing_ok=True)
