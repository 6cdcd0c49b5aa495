"""A run from its recipe to its last checkpoint: the parent prepares and starts the ranks, each rank trains."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao import cpu
from nemo_rao.checkpoint.continuing import (
    DATA,
    RECIPE,
    check_settings,
    data_record,
    describe,
    record_changes,
    write_run,
)
from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.checkpoint.starting import describe_heads, describe_start
from nemo_rao.config.derived import reference_dir, run_dir
from nemo_rao.config.monitor import validation_intervals
from nemo_rao.config.precision_checks import quantisation
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.encode import pad_token_id
from nemo_rao.data.store import PreferenceData
from nemo_rao.runtime.console import global_rank, is_first_rank, quiet_third_parties, say
from nemo_rao.runtime.curves import draw_curves
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.job import leave_if_stopped
from nemo_rao.runtime.launch import launch, started_externally
from nemo_rao.training.prepare import Prepared, check_ranks_started, import_nemo, prepare, select_device
from nemo_rao.training.targets import say_targets


def as_they_are(callbacks: list[Any]) -> list[Any]:
    return callbacks


def train(config: RunConfig, *, callbacks: Callable[[list[Any]], list[Any]] = as_they_are) -> None:
    """Train as the recipe says; continue where an earlier run of this name stopped.

    Args:
        config: a composed and checked recipe (:func:`nemo_rao.config.checks.check_run`).
        callbacks: the run's Lightning callbacks -> those that it has; called on every rank.

    Raises:
        UserError: the data, the model's sizes or a checkpoint do not fit; raised before a model is built.
        RankFailure: a rank failed.
    """
    quiet_third_parties()
    check_ranks_started(config)
    select_device(config)
    changes, folder = check_settings(config), run_dir(config)
    prepared = prepare(config)
    if prepared.finished_at is not None:
        asked = "" if prepared.finished_at == prepared.max_steps else f", and this recipe asks for {prepared.max_steps}"
        say(f"{folder}: finished at step {prepared.finished_at} of {prepared.finished_at}{asked}: nothing to do")
        return
    if import_nemo():
        say(cpu.NOTICE)
    prepared = dataclasses.replace(prepared, changes=[*changes, *prepared.changes])
    say_targets(config, prepared.objective_config, prepared.train.reward_summary())
    if prepared.resume_from is None:
        say(describe_start(config, prepared.start_from))
        for line in describe_heads(config, prepared.objective_config, prepared.start_from):
            say(line)
    else:
        say(f"continuing from {prepared.resume_from}, step {step_of(prepared.resume_from)} of {prepared.max_steps}")
    for line in describe(prepared.changes):
        say(line)
    folder.mkdir(parents=True, exist_ok=True)
    launch(
        run_rank, (config, prepared, callbacks), num_ranks=config.trainer.devices, num_nodes=config.trainer.num_nodes
    )
    if is_first_rank():
        say(f"checkpoint   {last_checkpoint(folder) or 'none kept'}")
        say(f"TensorBoard  {folder / 'tensorboard'}")
        say(f"metrics      {folder / 'metrics.jsonl'}")
        if config.exp_manager.draw_curves:
            say(f"curves       {draw_curves(folder)}")
        write_run(folder, start_from=prepared.start_from, max_steps=prepared.max_steps, finished_at=prepared.max_steps)


def _record_start(config: RunConfig, prepared: Prepared) -> None:
    """What the run is from its next step on: its recipe, data and start, and what has changed since its last start."""
    folder = run_dir(config)
    write_atomically(folder / RECIPE, to_yaml(config))
    write_atomically(folder / DATA, json.dumps(data_record(prepared.train, prepared.validation), indent=2) + "\n")
    write_run(folder, start_from=prepared.start_from, max_steps=prepared.max_steps)
    record_changes(folder, prepared.changes, 0 if prepared.resume_from is None else step_of(prepared.resume_from))


def set_up_rank(config: RunConfig) -> None:
    """What a rank does before it builds anything; its place is in the environment."""
    import torch
    from lightning_utilities.core.rank_zero import rank_zero_only
    from nemo.utils import logging as nemo_logging

    vars(rank_zero_only)["rank"] = global_rank()  # read once, at the import, which forked ranks have behind them
    quiet_third_parties()
    nemo_logging.setLevel(nemo_logging.WARNING)
    if config.trainer.threads_per_rank is not None:
        torch.set_num_threads(config.trainer.threads_per_rank)
    # The one place where NeMo reads how long ranks wait for each other.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(config.trainer.timeout_minutes * 60)))
    torch.manual_seed(config.trainer.seed)


def make_trainer(
    config: RunConfig,
    *,
    max_steps: int,
    folder: Path,
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Any] = (),
    start_from: Path | None = None,
) -> Any:
    """NeMo's trainer over the recipe's ranks.

    Args:
        folder: of results.
        callbacks: what NeMo may copy and store with every checkpoint: nothing that holds data.
        start_from: a checkpoint whose weights are read before the first step.
    """
    import torch
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from nemo import lightning as nl
    from nemo.lightning.pytorch.strategies.utils import RestoreConfig
    from nemo.utils import AppState

    from nemo_rao.engines.nemo import build

    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        max_steps=max_steps,
        max_epochs=-1,
        strategy=build.strategy(config),
        plugins=build.precision(config),
        callbacks=list(callbacks),
        logger=list(loggers),
        log_every_n_steps=0,  # Lightning logs nothing by itself: nemo_rao.engines.nemo.step_metrics does
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # validation is a callback: it sees every prompt once, however many ranks there are
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accumulate_grad_batches=1,
    )
    trainer.strategy.cluster_environment = (
        SLURMEnvironment(auto_requeue=False) if started_externally() == "slurm" else TorchElasticEnvironment()
    )
    AppState().log_dir = folder
    if start_from is not None:
        trainer.strategy.restore_config = RestoreConfig(path=str(start_from))
    return trainer


def run_rank(config: RunConfig, prepared: Prepared, callbacks: Callable[[list[Any]], list[Any]]) -> None:
    """One rank's part of a run; its place is in the environment."""
    import torch
    from nemo.lightning.resume import AdapterPath

    from nemo_rao.engines.nemo import build
    from nemo_rao.engines.nemo.data_module import AlignmentData, AlignmentDataModule

    set_up_rank(config)
    folder, keys = run_dir(config), config.model
    model = build.model(config, prepared.objective_config, prepared.max_steps)
    padding = pad_token_id(model.tokenizer.tokenizer)

    def laid_out(data: PreferenceData, mismatched: PreferenceData | None = None) -> AlignmentData:
        return AlignmentData(
            data,
            pad_token_id=padding,
            mismatched=None if mismatched is None else laid_out(mismatched),
            **build.batch_layout(config),
        )

    data_sets = {"training": laid_out(prepared.train, prepared.mismatched.get("train"))}
    if prepared.validation is not None:
        data_sets["validation"] = laid_out(prepared.validation, prepared.mismatched.get("validation"))
    module = AlignmentDataModule(
        data_sets["training"],
        micro_batch_size=keys.micro_batch_size,
        global_batch_size=keys.global_batch_size,
        seq_length=keys.seq_length,
        seed=config.data.seed if config.data.shuffle else None,
    )
    trainer = make_trainer(
        config,
        max_steps=prepared.max_steps,
        folder=folder,
        callbacks=[build.checkpoint_callback(config, folder)],
        loggers=_loggers(config, folder),
        start_from=prepared.start_from if prepared.resume_from is None else None,
    )
    # Set after construction: NeMo copies and stores a trainer's arguments with every checkpoint, and these hold the
    # data. They come first, so that a checkpoint sees the step's metrics.
    record = functools.partial(_record_start, config, prepared)
    trainer.callbacks[:0] = callbacks(_callbacks(config, model, data_sets, record))
    if prepared.resume_from is not None:
        # A LoRA run's checkpoints hold its adapters alone: the weights below them come from where the run started.
        adapters_only = model.model_transform is not None
        trainer.ckpt_path = (
            AdapterPath(prepared.resume_from, base_model_path=prepared.start_from)
            if adapters_only
            else str(prepared.resume_from)
        )
    trainer.fit(model, module)
    if config.exp_manager.create_wandb_logger and trainer.is_global_zero:
        import wandb

        wandb.finish()  # a rank ends without the interpreter's own shutdown, which would do it
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave_if_stopped()


def _callbacks(config: RunConfig, model: Any, data_sets: Mapping[str, Any], record: Callable[[], None]) -> list[Any]:
    """What happens around the steps, in the order in which it happens; ``record`` once nothing is left to refuse."""
    from nemo_rao.engines.nemo.callbacks import (
        CalibrateScales,
        KeepSchedule,
        MismatchedPass,
        RecordStart,
        SeedEveryStep,
        ShowProgress,
    )
    from nemo_rao.engines.nemo.finite import StopWhereNotFinite
    from nemo_rao.engines.nemo.reference_pass import CheckFirstStep, ReferencePass
    from nemo_rao.engines.nemo.step_metrics import Metrics, StepLog, Validation
    from nemo_rao.engines.nemo.stop import StopWhenAsked

    folder, keys = run_dir(config), config.model
    log = StepLog(folder / "metrics.jsonl")
    callbacks: list[Any] = [StopWhenAsked(), SeedEveryStep(config.trainer.seed)]
    if model.model_transform is not None:
        # Adds the adapters after the reference pass, which so sees the model that they start from.
        callbacks.append(model.model_transform)
    if config.precision.fp8 is not None and config.precision.fp8_recipe == "delayed":
        callbacks.append(CalibrateScales())
    if model.needs.reference:
        mismatched = {f"{name}, mismatched": data.mismatched for name, data in data_sets.items() if data.mismatched}
        callbacks.append(
            ReferencePass(
                {**data_sets, **mismatched},
                cache_dir=reference_dir(config),
                precision=quantisation(config.precision),
                micro_batch_size=config.reference.micro_batch_size or keys.micro_batch_size,
                micro_batches_per_part=config.reference.save_every,
                vocab_size=model.vocab_size,
                show_progress=config.trainer.enable_progress_bar,
            )
        )
        callbacks.append(CheckFirstStep(config.precision, reference_dir(config)))
    callbacks += [
        KeepSchedule(),
        Metrics(folder, log, log_every_n_steps=config.trainer.log_every_n_steps),
        StopWhereNotFinite(skips_steps=config.precision.params == "fp16"),
    ]
    if model.needs.mismatched:
        callbacks.append(MismatchedPass())
    if "validation" in data_sets:
        callbacks.append(
            Validation(
                data_sets["validation"],
                log,
                intervals=validation_intervals(config),
                micro_batch_size=keys.micro_batch_size,
            )
        )
    callbacks.append(RecordStart(record))
    if config.trainer.enable_progress_bar:
        callbacks.append(ShowProgress())
    return callbacks


def _loggers(config: RunConfig, folder: Path) -> list[Any]:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    loggers: list[Any] = [TensorBoardLogger(folder, name="tensorboard", version="")]
    if config.exp_manager.create_wandb_logger:
        wandb_keys = dataclasses.asdict(config.exp_manager.wandb_logger_kwargs)
        wandb_keys["name"] = wandb_keys["name"] or config.exp_manager.name
        loggers.append(WandbLogger(save_dir=folder, **wandb_keys))
    return loggers
