"""Micro-batches for NeMo's trainer: the same order for any parallelism, resumed by the step number alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import lightning.pytorch as pl
import numpy as np
from megatron.core import parallel_state
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, IterableDataset

from nemo_rao.batch import MicroBatch
from nemo_rao.data.collate import collate
from nemo_rao.data.order import every_sample_once, global_batch, rank_micro_batches
from nemo_rao.data.prefetch import Prefetcher
from nemo_rao.data.store import PreferenceData
from nemo_rao.mcore.context_parallel import part_of_rank, size_and_rank
from nemo_rao.mcore.forward import made_ahead


class AlignmentData:
    """A data set with the reference sums that belong to it, cut into micro-batches.

    Attributes:
        reference: ``[responses, 2]`` float32 sums, set by the reference pass; ``None`` for objectives without one.
        mismatched: the same prompts, each with a response to another one; ``None`` where that is not needed.

    Args:
        pad_token_id, pad_multiple, packed, shared_prompts: see :func:`nemo_rao.data.collate.collate`.
    """

    def __init__(
        self,
        data: PreferenceData,
        *,
        pad_token_id: int,
        pad_multiple: int,
        packed: bool = False,
        shared_prompts: bool = False,
        mismatched: AlignmentData | None = None,
    ) -> None:
        self.data = data
        self.mismatched = mismatched
        self.reference: np.ndarray | None = None
        self._pad_token_id = pad_token_id
        self._pad_multiple = pad_multiple
        self._packed = packed
        self._shared_prompts = shared_prompts

    def micro_batch(self, prompts: Sequence[int]) -> MicroBatch:
        """The prompts with these numbers and all their responses; of the tokens, this context-parallel rank's."""
        batch = collate(
            [self.data[i] for i in prompts],
            [self.data.response_offset(i) for i in prompts],
            pad_token_id=self._pad_token_id,
            pad_multiple=self._pad_multiple,
            packed=self._packed,
            shared_prompts=self._shared_prompts,
            reference=self.reference,
        )
        return part_of_rank(batch, *size_and_rank())

    def micro_batches_of_rank(self, micro_batch_size: int) -> list[list[int]]:
        """Prompt numbers of this data-parallel rank's micro-batches in a pass over the whole data set."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return every_sample_once(len(self.data), micro_batch_size, rank, size)

    def responses_of_prompts(self) -> list[range]:
        """For each prompt, the numbers of its responses."""
        offsets = [self.data.response_offset(i) for i in range(len(self.data))] + [self.data.num_responses]
        return [range(start, stop) for start, stop in itertools.pairwise(offsets)]


class _Stream(IterableDataset):
    """This data-parallel rank's micro-batches from a step on, without end."""

    def __init__(self, module: AlignmentDataModule, start_step: int) -> None:
        self._module = module
        self._start_step = start_step

    def __iter__(self) -> Iterator[MicroBatch]:
        # A generator: nothing is made before the first one is asked for, when the reference sums are there.
        with made_ahead(self._micro_batches()) as ahead:
            self._module.ahead = ahead
            yield from ahead

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for step in itertools.count(self._start_step):
            for prompts in self._module.micro_batches_of_step(step):
                yield self._module.train.micro_batch(prompts)


class _Sampler(MegatronDataSampler):
    """Tells NeMo the sizes; the data loaders already yield each rank's micro-batches."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        return dataloader


class AlignmentDataModule(pl.LightningDataModule):
    """Training data for NeMo's trainer. Validation passes over whole data sets and has no loader.

    Args:
        train: tokenised data.
        micro_batch_size, global_batch_size: prompts.
        seq_length: tokens, the longest row allowed.
        seed: of the order; ``None`` keeps the file's order in every epoch.
    """

    def __init__(
        self, train: AlignmentData, *, micro_batch_size: int, global_batch_size: int, seq_length: int, seed: int | None
    ) -> None:
        super().__init__()
        self.train = train
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._seed = seed
        self.ahead: Prefetcher[MicroBatch] | None = None  # of the loader in use
        self.data_sampler = _Sampler(
            seq_len=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            output_log=False,
        )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return DataLoader(_Stream(self, self.trainer.global_step), batch_size=None)

    def teardown(self, stage: str) -> None:
        self._stop()

    def on_exception(self, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        # Said, not left to the loader's end: Lightning, or the traceback of what went wrong, may hold on to it.
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None

    def prompts_of_step(self, step: int) -> np.ndarray:
        """``[global_batch_size]`` int64, prompt numbers of an optimizer step's global batch; steps count from 0."""
        return global_batch(
            step, num_samples=len(self.train.data), global_batch_size=self._global_batch_size, seed=self._seed
        )

    def micro_batches_of_step(self, step: int) -> list[list[int]]:
        """Prompt numbers of this data-parallel rank's micro-batches in an optimizer step, counted from 0."""
        prompts = self.prompts_of_step(step)
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return rank_micro_batches(prompts, self._micro_batch_size, rank, size)
