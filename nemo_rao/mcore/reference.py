"""Numbers of every response of a data set by one forward-only pass, kept on disk; above all the reference policy's.

The reference is the policy before its first step and enters a loss only through two sums per response. They are
computed once, under the parallelism of the training run, and read back by every later epoch, resumed run, and run that
starts from the same weights. Nothing of the model is held twice.

On disk, below the cache folder::

    <key>/part-<first>-<last>-<count>.npz   response numbers and their sums, while a pass is under way
    <key>/sums.npy                          [responses, W] float32, when it is complete; W = 2 for the reference

Every file is written under a temporary name first. A pass that was interrupted goes on with what its parts lack,
under any parallelism.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_rao.batch import MicroBatch, ModelOutput
from nemo_rao.files import written_atomically
from nemo_rao.mcore.forward import evaluation_mode, forward_only
from nemo_rao.mcore.loss import sequence_log_probs

_FORMAT = "reference-sums-1"
_SUMS = "sums.npy"


def reference_key(*, weights: str, data: str, precision: str) -> str:
    """The cache key of a reference pass: what its numbers depend on, and nothing else."""
    return hashlib.sha256("|".join((_FORMAT, weights, data, precision)).encode()).hexdigest()[:32]


def load_numbers(cache_dir: Path, key: str, num_responses: int, width: int) -> np.ndarray | None:
    """The finished numbers ``[responses, width]`` float32, or ``None``."""
    path = cache_dir / key / _SUMS
    if not path.exists():
        return None
    sums = np.load(path, mmap_mode="r", allow_pickle=False)
    assert sums.shape == (num_responses, width), (path, sums.shape, num_responses)
    return sums


def load_reference(cache_dir: Path, key: str, num_responses: int) -> np.ndarray | None:
    """The finished sums ``[responses, 2]`` float32 (prompt without t0, response; nats), or ``None``."""
    return load_numbers(cache_dir, key, num_responses, 2)


def compute_reference(model: Sequence[Any], *, vocab_size: int, **arguments: Any) -> np.ndarray:
    """Compute, or read back, the reference sums of a data set. A collective over all ranks.

    Args:
        model: this rank's model chunks, holding the reference weights; left in the mode they came in.
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
    """Compute, or read back, some numbers of every response. A collective over all ranks.

    Args:
        model: this rank's model chunks; left in the mode they came in.
        numbers: (output, micro-batch) -> ``[R, width]``; called on the last pipeline stage.
        prompts: for each prompt, the numbers of its responses.
        make_micro_batch: prompt numbers -> micro-batch.
        micro_batch_size: prompts in a micro-batch.
        micro_batches_per_part: how much is lost at most when the pass is interrupted.
        cache_dir: a folder that all ranks share.
        key: of what the numbers depend on, such as :func:`reference_key`.
        progress: called with (prompts done, prompts in all) on every rank, about this rank's own share.

    Returns:
        ``[responses, width]`` float32. Memory-mapped, read-only.
    """
    num_responses = sum(len(responses) for responses in prompts)
    folder = cache_dir / key
    complete = [load_numbers(cache_dir, key, num_responses, width) is not None]
    torch.distributed.broadcast_object_list(complete, src=0)  # one rank's view of the disk decides
    if not complete[0]:
        folder.mkdir(parents=True, exist_ok=True)
        remaining = _remaining_prompts(folder, prompts, num_responses, width)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine, longest = remaining[rank::size], -(-len(remaining) // size)
        for done, responses, sums in _sums_of(
            model, mine, longest, make_micro_batch, micro_batch_size, micro_batches_per_part, numbers, width
        ):
            if parallel_state.get_tensor_and_context_parallel_rank() == 0 and len(responses):
                _write_part(folder, responses, sums)
            if progress is not None:
                progress(done, len(mine))
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            _merge(folder, num_responses, width)
        torch.distributed.barrier()
    finished = load_numbers(cache_dir, key, num_responses, width)
    assert finished is not None, f"{folder} is not shared by all ranks"
    return finished


def _remaining_prompts(folder: Path, prompts: Sequence[Sequence[int]], num_responses: int, width: int) -> list[int]:
    """Prompts that no part covers, as rank 0 sees the folder; the same on every rank."""
    remaining: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        known = np.isfinite(_read_parts(folder, num_responses, width)[:, -1])
        remaining = [[i for i, responses in enumerate(prompts) if not known[list(responses)].all()]]
    torch.distributed.broadcast_object_list(remaining, src=0)
    return remaining[0]


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
    """Part by part: prompts done, response numbers ``[n]``, sums ``[n, width]``; n = 0 before the last stage.

    ``longest``: prompts of the rank that has most. All go through equally many parts: ranks may share experts.
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


def _write_part(folder: Path, responses: np.ndarray, sums: np.ndarray) -> None:
    name = f"part-{responses.min()}-{responses.max()}-{len(responses)}.npz"
    with written_atomically(folder / name) as (file,):
        np.savez(file, responses=responses, sums=sums)


def _read_parts(folder: Path, num_responses: int, width: int) -> np.ndarray:
    """``[responses, width]`` float32, NaN where no part has the response. What cannot be read counts as absent."""
    sums = np.full((num_responses, width), np.nan, dtype=np.float32)
    for path in sorted(folder.glob("part-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                sums[part["responses"]] = part["sums"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            path.unlink()
    return sums


def _merge(folder: Path, num_responses: int, width: int) -> None:
    sums = _read_parts(folder, num_responses, width)
    missing = int((~np.isfinite(sums)).any(axis=1).sum())
    if missing:
        raise FloatingPointError(f"the model's numbers of {missing} of {num_responses} responses are not finite")
    with written_atomically(folder / _SUMS) as (file,):
        np.save(file, sums)
    for path in folder.glob("part-*.npz"):
        path.unlink()
