"""Numbers of every response of a data set by one forward-only pass, kept on disk; above all the reference policy's.

The reference is the policy before its first step and enters a loss only through two sums per response. They are
computed once, under the parallelism of the training run, and read back by every later epoch, resumed run, and run that
starts from the same weights. Nothing of the model is held twice.

On disk, below the cache folder::

    <key>/part-<writer>-<number>.npz   response numbers and their sums, while a pass is under way
    <key>/sums.npy                     [responses, W] float32, when it is complete; W = 2 for the reference

Every file is written under a temporary name first. A pass that was interrupted goes on with what its parts lack,
under any parallelism.

Several runs may compute the same numbers at once, on a file system without reliable locks: each writes parts under
names of its own, overwrites nobody's, and merges what it has in memory. Parts only serve a successor; once ``sums.npy``
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
    """The cache key of a reference pass: what its numbers depend on, and nothing else.

    Args:
        weights: see :func:`nemo_rao.mcore.fingerprint.weights_fingerprint`.
        network: what is computed with them, see :func:`nemo_rao.mcore.network.network_fingerprint`.
        data: fingerprint of the tokenised rows.
        precision: number formats, scales included.
    """
    return hashlib.sha256("|".join((_FORMAT, weights, network, data, precision)).encode()).hexdigest()[:32]


def earlier_reference_key(*, weights: str, data: str, precision: str) -> str:
    """The key of earlier versions, whose checkpoints do not record their network, for the same numbers."""
    return hashlib.sha256("|".join(("reference-sums-1", weights, data, precision)).encode()).hexdigest()[:32]


def load_numbers(cache_dir: Path, key: str, num_responses: int, width: int) -> np.ndarray | None:
    """The finished numbers ``[responses, width]`` float32, memory-mapped, or ``None``."""
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
    """Compute, or read back, the reference log-probs of a data set. A collective over all ranks.

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
        _remove_parts(folder)  # of runs that were killed after another had finished
    finished = load_numbers(cache_dir, key, num_responses, width)
    assert finished is not None, f"{folder} is not shared by all ranks"
    return finished


def _is_complete(cache_dir: Path, key: str, num_responses: int, width: int) -> bool:
    """Whether the numbers are there already, as rank 0 sees the disk."""
    complete = [torch.distributed.get_rank() == 0 and load_numbers(cache_dir, key, num_responses, width) is not None]
    torch.distributed.broadcast_object_list(complete, src=0)
    return complete[0]


def _begin(
    folder: Path, prompts: Sequence[Sequence[int]], num_responses: int, width: int
) -> tuple[np.ndarray | None, list[int]]:
    """What parts hold, on rank 0 alone, and the prompts that they do not cover, on every rank."""
    known, remaining = None, [[0]]
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_parts(folder, num_responses, width)
        present = np.isfinite(known).all(axis=1)
        remaining = [[i for i, responses in enumerate(prompts) if not present[list(responses)].all()]]
    torch.distributed.broadcast_object_list(remaining, src=0)
    return known, remaining[0]


def _over_ranks(computed: np.ndarray, covered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ranks' numbers ``[responses, width]`` and which of them there are ``[responses]``. A collective.

    Data-parallel ranks have different responses, and one rank of each model-parallel group has them.
    """
    columns = np.concatenate([np.where(covered[:, None], computed, 0), covered[:, None]], axis=1, dtype=np.float32)
    total = torch.from_numpy(columns)
    if torch.cuda.is_available():
        total = total.cuda()
    torch.distributed.all_reduce(total)
    columns = total.cpu().numpy()
    return columns[:, :-1], columns[:, -1] > 0


def _finish(folder: Path, known: np.ndarray | None, computed: tuple[np.ndarray, np.ndarray]) -> None:
    """Write the numbers from rank 0's memory, unless another run was first. A collective.

    Raises:
        FloatingPointError: some of them are not finite.
    """
    missing: list[int] = [0]
    if known is not None:
        sums = np.where(computed[1][:, None], computed[0], known)
        missing = [int((~np.isfinite(sums)).any(axis=1).sum())]
        if missing == [0]:
            if not (folder / _SUMS).exists():  # else readers have that one mapped
                with written_atomically(folder / _SUMS) as (file,):
                    np.save(file, sums)
            _remove_parts(folder)
    torch.distributed.broadcast_object_list(missing, src=0)  # also: nobody reads before it is written
    if missing != [0]:
        raise FloatingPointError(f"the model's numbers of {missing[0]} of {len(computed[1])} responses are not finite")


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


class _Parts:
    """What this rank has computed so far, on disk.

    Args:
        folder: of the pass.
        writes: this rank is the one of its tensor- and context-parallel group that writes.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._writer = secrets.token_hex(8)  # drawn: processes of several nodes and jobs write into one folder
        self._count = 0

    def add(self, responses: np.ndarray, sums: np.ndarray) -> bool:
        """Write one part: response numbers ``[n]`` and sums ``[n, width]``. Returns whether these are this rank's."""
        if not self._writes or not len(responses):
            return False
        with written_atomically(self._folder / f"part-{self._writer}-{self._count}.npz") as (file,):
            np.savez(file, responses=responses, sums=sums)
        self._count += 1
        return True


def _read_parts(folder: Path, num_responses: int, width: int) -> np.ndarray:
    """``[responses, width]`` float32, NaN where no part has the response. What cannot be read counts as absent."""
    sums = np.full((num_responses, width), np.nan, dtype=np.float32)
    for path in sorted(folder.glob("part-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as part:
                sums[part["responses"]] = part["sums"]
        except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
            continue  # damaged, or another run has finished and removed it meanwhile
    return sums


def _remove_parts(folder: Path) -> None:
    for path in folder.glob("part-*.npz"):
        path.unlink(missing_ok=True)
