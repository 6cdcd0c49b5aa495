"""What happens around NeMo's training steps: random numbers, the reference pass, metrics, validation, progress."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from nemo.lightning.megatron_parallel import MegatronStep

from nemo_rao.batch import MicroBatch
from nemo_rao.errors import UserError
from nemo_rao.integration.data_module import AlignmentData
from nemo_rao.integration.metrics_file import append_metrics, truncate_metrics
from nemo_rao.integration.model import AlignmentLossReduction
from nemo_rao.mcore.calibration import calibrate
from nemo_rao.mcore.evaluate import evaluate
from nemo_rao.mcore.fingerprint import weights_fingerprint
from nemo_rao.mcore.loss import means, reduce_statistics
from nemo_rao.mcore.mismatched import mean_log_ratio
from nemo_rao.mcore.quantisation import quantisation_fingerprint
from nemo_rao.mcore.reference import compute_reference, load_reference, reference_key
from nemo_rao.progress import Progress


def model_chunks(trainer: pl.Trainer) -> list[Any]:
    """This rank's model chunks, as Megatron's schedules take them."""
    pipeline = trainer.strategy.megatron_parallel.pipeline
    return pipeline if isinstance(pipeline, list) else [pipeline]


class SeedEveryStep(pl.Callback):
    """Random numbers as a function of (seed, step, rank): a resumed run draws what an undisturbed one would."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # Megatron derives the tensor-parallel ranks' seeds by adding up to a few thousand: keep the steps' seeds apart.
        seed = (self._seed * 1_000_003 + trainer.global_step * 100_003) % (2**31)
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        torch.manual_seed(seed + rank)
        model_parallel_cuda_manual_seed(seed + 10 * rank)


class KeepSchedule(pl.Callback):
    """Learning rate and optimizer settings follow the recipe, also on resume: a run may be made longer, or changed.

    A checkpoint restores the scheduler's every attribute, the length of the run included, and the optimizer's
    hyperparameters; past that length the learning rate would stay at its minimum without a word. Only the number of
    steps done is the checkpoint's.
    """

    _OF_CHECKPOINT = ("last_epoch", "_step_count", "_last_lr", "base_lrs", "optimizer")

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        for optimizer, groups in zip(strategy.optimizers, strategy.of_recipe, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            throwaway = torch.optim.SGD([torch.zeros(1)], lr=scheduler.base_lrs[0])
            of_recipe = pl_module.optim.lr_scheduler.scheduler(pl_module, throwaway)["lr_scheduler"]["scheduler"]
            vars(scheduler).update(
                {name: value for name, value in vars(of_recipe).items() if name not in self._OF_CHECKPOINT}
            )
            scheduler._get_lr_called_within_step = True  # spares a warning meant for other callers
            scheduler._last_lr = scheduler.get_lr()
            scheduler._get_lr_called_within_step = False
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate


class CalibrateScales(pl.Callback):
    """Before anything is computed, scales for delayed scaling (:mod:`nemo_rao.mcore.calibration`).

    A checkpoint carries them with the model: a resumed run has none to set.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            module = trainer.datamodule
            calibrate(model_chunks(trainer), module.micro_batches_of_step(0), make_micro_batch=module.train.micro_batch)


class ReferencePass(pl.Callback):
    """Before the first step, the reference policy's sums; on resume, the same sums from the cache.

    A checkpoint carries what the cache keys are made of, since the weights, and the scales of delayed scaling, that
    they were computed with are gone by then.

    Args:
        data_sets: name -> data whose ``reference`` is to be set.
        cache_dir: a folder that all ranks share.
        precision: part of the key: numbers computed in another precision are other numbers.
        micro_batch_size: prompts.
        micro_batches_per_part: how much is lost at most when the pass is interrupted.
        vocab_size: V without padding.
        show_progress: on the first rank.
    """

    def __init__(
        self,
        data_sets: Mapping[str, AlignmentData],
        *,
        cache_dir: Path,
        precision: str,
        micro_batch_size: int,
        micro_batches_per_part: int,
        vocab_size: int,
        show_progress: bool = True,
    ) -> None:
        self._data_sets = data_sets
        self._cache_dir = cache_dir
        self._precision = precision
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_part = micro_batches_per_part
        self._vocab_size = vocab_size
        self._show_progress = show_progress
        self._weights: str | None = None
        self._scales = ""

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights, "scales": self._scales}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._weights = state_dict["weights"]
        self._scales = state_dict.get("scales", "")  # checkpoints of before there was FP8 have none

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        started_here = self._weights is None
        if self._weights is None:
            sharded = trainer.strategy.megatron_parallel.sharded_state_dict()
            self._weights = weights_fingerprint(sharded, vocab_size=self._vocab_size)
            self._scales = quantisation_fingerprint(model_chunks(trainer))
        for name, data_set in self._data_sets.items():
            data = data_set.data
            precision = self._precision + self._scales
            key = reference_key(weights=self._weights, data=data.fingerprint(), precision=precision)
            if started_here:
                data_set.reference = self._compute(trainer, data_set, key, name)
            else:
                data_set.reference = load_reference(self._cache_dir, key, data.num_responses)
            if data_set.reference is None:
                raise UserError(
                    f"{self._cache_dir / key} is missing: the reference log-probabilities of the {name} data that this "
                    "run started with (or the data has changed since); restore the folder and the data, or start a "
                    "new run under another exp_manager.name"
                )

    def _compute(self, trainer: pl.Trainer, data_set: AlignmentData, key: str, name: str) -> Any:
        shown = self._show_progress and trainer.is_global_zero
        with Progress(f"reference log-probs ({name})", unit="prompt", shown=shown) as progress:
            return compute_reference(
                model_chunks(trainer),
                prompts=data_set.responses_of_prompts(),
                make_micro_batch=data_set.micro_batch,
                micro_batch_size=self._micro_batch_size,
                micro_batches_per_part=self._micro_batches_per_part,
                vocab_size=self._vocab_size,
                cache_dir=self._cache_dir,
                key=key,
                progress=progress.update,
            )


class RecordStart(pl.Callback):
    """Lets rank 0 record what the run is, before the first step of this start and after all that may refuse it."""

    def __init__(self, record: Callable[[], None]) -> None:
        self._record = record

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._record()


class MismatchedPass(pl.Callback):
    """Before each step, the mean log-ratio of the step's prompts with responses to others, for the loss to use."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        module = trainer.datamodule
        mismatched = module.train.mismatched
        log_ratio = mean_log_ratio(
            model_chunks(trainer),
            module.micro_batches_of_step(trainer.global_step),
            make_micro_batch=mismatched.micro_batch,
            vocab_size=pl_module.vocab_size,
        )
        for chunk in model_chunks(trainer):
            chunk.mismatched_log_ratio = log_ratio


class Metrics(pl.Callback):
    """Reduces a step's statistics over the whole global batch and logs them, on every rank alike.

    Beside the objective's own:

        tokens_per_second        of the batch's rows, prompt and response, whatever the layout; over all ranks
        data/token_efficiency    tokens that were computed, over those with padding
        data/tokens_shared       fraction of the rows' tokens that was not computed, as prompts were shared

    Rank 0 also appends each step's numbers to ``metrics.jsonl`` in the run folder; a resumed run first drops the lines
    of steps that it computes again. At the end it writes each rank's peak memory to ``memory.json``, in bytes: of the
    GPU, or of the process where there is none, what it shares with the other ranks included.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._step_started = 0.0
        self._tokens = np.zeros(3)
        self._names: list[str] = []  # of the objective's statistics, since they were first seen
        self._latest: dict[str, float] = {}
        self._tokens_of_rows = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            truncate_metrics(self._path, trainer.global_step or -1)

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()
        self._tokens = np.zeros(3)

    def on_megatron_microbatch_start(
        self, step: MegatronStep, batch: MicroBatch, forward_callback: AlignmentLossReduction
    ) -> None:
        # Counted once: by the chunk that embeds the tokens, on one of the ranks that have them.
        if forward_callback.embeds_tokens and parallel_state.get_tensor_and_context_parallel_rank() == 0:
            num_places = batch.tokens.numel() * parallel_state.get_context_parallel_world_size()
            self._tokens += (batch.num_row_tokens, batch.num_tokens, num_places)

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: list, reduced: Any) -> None:
        of_rows, computed, with_padding = self._tokens.tolist()
        tokens = {
            "data/token_efficiency": (computed, with_padding),
            "data/tokens_shared": (of_rows - computed, of_rows),
        }
        statistics = reduce_statistics(microbatch_outputs, names=self._names, of_rank=tokens)
        self._names = [name for name in statistics if name not in tokens]
        self._latest = means(statistics)
        self._tokens_of_rows = statistics["data/tokens_shared"][1].item()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        seconds = time.perf_counter() - self._step_started
        logged = {**self._latest, "tokens_per_second": self._tokens_of_rows / seconds}
        # Not by log_dict, which takes about a millisecond for each number. A checkpoint's monitor looks them up here.
        of_callbacks = trainer.callback_metrics
        of_callbacks.update({name: torch.tensor(value) for name, value in logged.items()})
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.should_stop:
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=trainer.global_step - 1)  # NeMo's count, which starts at 0
        if trainer.is_global_zero:
            record = {"step": trainer.global_step, **logged}
            record |= {name: float(of_callbacks[name]) for name in ("grad_norm", "lr") if name in of_callbacks}
            append_metrics(self._path, record)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        peaks: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(peaks, peak_memory())
        if trainer.is_global_zero:
            self._path.with_name("memory.json").write_text(json.dumps({"peak_bytes_by_rank": peaks}))


def peak_memory() -> int:
    """This rank's peak memory so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Validation(pl.Callback):
    """Evaluates the policy on every validation prompt: before the first step, at an interval, and at the end.

    The means are logged as ``val/<metric>``; rank 0 also appends them to ``metrics.jsonl``.

    Args:
        data: the validation data.
        every_n_steps: optimizer steps between evaluations.
        micro_batch_size: prompts.
        folder: the run folder.
    """

    def __init__(self, data: AlignmentData, *, every_n_steps: int, micro_batch_size: int, folder: Path) -> None:
        self._data = data
        self._every_n_steps = every_n_steps
        self._micro_batch_size = micro_batch_size
        self._path = folder / "metrics.jsonl"
        self._last_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module, log=False)  # Lightning takes no metrics before the first step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self._every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._evaluate(trainer, pl_module, log=True)

    def _evaluate(self, trainer: pl.Trainer, pl_module: Any, log: bool) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        chunks, micro_batches = model_chunks(trainer), self._data.micro_batches_of_rank(self._micro_batch_size)
        log_ratio = None
        if self._data.mismatched is not None:
            log_ratio = mean_log_ratio(
                chunks,
                micro_batches,
                make_micro_batch=self._data.mismatched.micro_batch,
                vocab_size=pl_module.vocab_size,
            )
        values = evaluate(
            chunks,
            micro_batches,
            make_micro_batch=self._data.micro_batch,
            objective=pl_module.objective,
            objective_config=pl_module.objective_config,
            vocab_size=pl_module.vocab_size,
            mismatched_log_ratio=log_ratio,
        )
        named = {f"val/{name}": value for name, value in values.items()}
        if log:
            pl_module.log_dict(named, batch_size=1)
        if trainer.is_global_zero:
            append_metrics(self._path, {"step": trainer.global_step, **named})


class ShowProgress(pl.Callback):
    """Shows steps on rank 0, with metrics that are already reduced: no rank takes part in a collective alone."""

    shown = ("loss", "rao/target_error", "rewards/margins", "rewards/accuracies", "tokens_per_second")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress = Progress(
            pl_module.objective.name,
            unit="step",
            total=trainer.max_steps,
            done=trainer.global_step,
            shown=trainer.is_global_zero,
        ).__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        of_step = trainer.callback_metrics
        metrics = {name: float(of_step[name]) for name in self.shown if name in of_step}
        self._progress.update(trainer.global_step, metrics=metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.__exit__(None, None, None)
