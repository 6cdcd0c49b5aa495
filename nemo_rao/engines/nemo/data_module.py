"""Micro-batches for NeMo's trainer."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, IterableDataset

from nemo_rao.batch import MicroBatch
from nemo_rao.data.prefetch import NotAhead, Prefetcher
from nemo_rao.loop.data import TrainingData


class _Stream(IterableDataset):
    """Yields this data-parallel rank's micro-batches from a step on, endlessly."""

    def __init__(self, module: AlignmentDataModule, start_step: int) -> None:
        self._module = module
        self._start_step = start_step

    def __iter__(self) -> Iterator[MicroBatch]:
        # A generator: the first micro-batch is collated when requested, after the reference log-probs exist.
        with self._module.data.stream(self._start_step) as ahead:
            self._module.ahead = ahead
            yield from ahead


class _Sampler(MegatronDataSampler):
    """Provides the sizes to NeMo; the data loaders already yield each rank's micro-batches."""

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        return dataloader


class AlignmentDataModule(pl.LightningDataModule):
    """Training data for NeMo's trainer. Validation passes over whole data sets and has no loader.

    Args:
        data: training data, with its order.
        seq_length: maximum tokens of a row.
    """

    def __init__(self, data: TrainingData, *, seq_length: int) -> None:
        super().__init__()
        self.data = data
        self.ahead: Prefetcher[MicroBatch] | NotAhead[MicroBatch] | None = None  # of the loader in use
        self.data_sampler = _Sampler(
            seq_len=seq_length,
            micro_batch_size=data.micro_batch_size,
            global_batch_size=data.global_batch_size,
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
        # Explicitly: Lightning, or a traceback, may keep a reference to the loader.
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None
