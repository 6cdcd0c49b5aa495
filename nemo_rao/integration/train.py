"""A run from its recipe to its last checkpoint.

The parent process reads, tokenises and checks everything, so that whatever is wrong is said once and before a rank
exists; then it starts the ranks, which build the model and train.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_rao import cpu
from nemo_rao.data.dataset import PreferenceData, load_preferences
from nemo_rao.data.encode import load_tokenizer, pad_token_id
from nemo_rao.data.order import steps_per_epoch
from nemo_rao.errors import UserError
from nemo_rao.integration.checkpoints import check_checkpoint, last_checkpoint, resolve_checkpoint
from nemo_rao.integration.checks import check_architecture
from nemo_rao.integration.compose import to_yaml
from nemo_rao.integration.config import RunConfig, objective_config, reference_dir, run_dir, world_size
from nemo_rao.integration.curves import draw_curves
from nemo_rao.integration.launch import launch, started_externally
from nemo_rao.integration.talk import is_first_rank, quiet_imports, quiet_third_parties, say
from nemo_rao.objectives import registry


@dataclass(frozen=True)
class Prepared:
    """What every rank needs and the parent has worked out.

    Attributes:
        train, validation: tokenised data.
        objective_config: the objective's keys, with what depends on the data resolved.
        max_steps: optimizer steps of the whole run.
        resume_from: this run's last checkpoint, or ``None`` at its start.
        start_from: a checkpoint whose weights the run starts with, or ``None``.
    """

    train: PreferenceData
    validation: PreferenceData | None
    objective_config: Any
    max_steps: int
    resume_from: Path | None
    start_from: Path | None


def train(config: RunConfig) -> None:
    """Train as the recipe says; continue where an earlier run of this name stopped.

    Args:
        config: a composed and checked recipe (:func:`nemo_rao.integration.checks.check_run`).

    Raises:
        UserError: the data, the model's sizes or a checkpoint do not fit; raised before a model is built.
        RankFailure: a rank failed.
    """
    quiet_third_parties()
    check_ranks_started(config)
    select_device(config)
    prepared = prepare(config)
    if import_nemo():
        say(cpu.NOTICE)
    folder = run_dir(config)
    if prepared.resume_from is not None:
        say(f"continuing from {prepared.resume_from}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "recipe.yaml", to_yaml(config))
    launch(run_rank, (config, prepared), num_ranks=config.trainer.devices, num_nodes=config.trainer.num_nodes)
    if is_first_rank():
        say(f"checkpoint   {last_checkpoint(folder)}")
        say(f"TensorBoard  {folder / 'tensorboard'}")
        say(f"metrics      {folder / 'metrics.jsonl'}")
        say(f"curves       {draw_curves(folder)}")


def check_ranks_started(config: RunConfig) -> None:
    """Refuses ranks that SLURM or torchrun did not start, or started in another number.

    Raises:
        UserError: names the launcher and both numbers.
    """
    launcher, ranks = started_externally(), world_size(config)
    if launcher is None:
        if config.trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={config.trainer.num_nodes}, but nothing started the other nodes: use srun (one "
                "task a device) or torchrun"
            )
        return
    started = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_STEP_NUM_TASKS"])
    if started != ranks:
        raise UserError(
            f"{launcher} started {started} ranks, but trainer.devices={config.trainer.devices} x "
            f"trainer.num_nodes={config.trainer.num_nodes} are {ranks}; make them equal"
        )


def select_device(config: RunConfig) -> None:
    """Decide what Megatron is to run on, before anything of it is imported.

    Raises:
        UserError: GPUs are asked for and there are none.
    """
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Asks the driver without initialising CUDA, which would not survive the fork of the ranks.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if not torch.cuda.is_available():
        if config.trainer.accelerator == "gpu":
            raise UserError("trainer.accelerator is gpu, but this machine has no CUDA device; set it to cpu")
        if config.model.context_parallel_size > 1:
            raise UserError(
                f"model.context_parallel_size={config.model.context_parallel_size} needs GPUs; set it to 1 on a CPU"
            )
        # Forking after torch has started threads of its own can hang the children.
        torch.set_num_threads(1)
    elif config.trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "lower it, or set trainer.accelerator=cpu"
        )


def import_nemo() -> bool:
    """Imports what a run needs of Megatron and NeMo, changed as this machine needs it. Returns whether to run on CPU.

    Not before everything that is wrong with the data has been said: it takes 20 seconds.
    """
    with quiet_imports():
        on_cpu = cpu.install_if_needed()
        from nemo_rao.integration import build  # noqa: F401

        try:
            from nemo.lightning.callback_group import CallbackGroup
        except ModuleNotFoundError:  # before NeMo 2.6
            return on_cpu
    # NeMo's telemetry is on wherever torchrun has set RANK=0, and then fails at the first checkpoint unless NeMo's own
    # API has described the run to it. It has no exporter anyhow.
    CallbackGroup.get_instance().callbacks.clear()
    return on_cpu


def prepare(config: RunConfig) -> Prepared:
    """Everything that can be checked and computed without a model. See :func:`train` for the errors."""
    keys, objective = config.model, registry.get(config.model.objective)
    tokenizer = load_tokenizer(config.data.tokenizer or "")
    needs: dict[str, Any] = {
        "seq_length": keys.seq_length,
        "num_responses": config.data.num_responses,
        "min_responses": objective.min_responses,
        "needs_rewards": objective.needs_rewards,
        "needs_preference": objective.needs_preference,
        "needs_shared_first_token": objective.needs_shared_first_token,
        "needed_by": f"objective {objective.name}",
        "strict": config.data.strict,
        "chat_template": config.data.chat_template,
        "template_arguments": config.data.template_arguments,
        "reward_field": config.data.reward_field,
    }
    data = _load(config, config.data.train_path, tokenizer, "training data", needs)
    validation = None
    if config.data.validation_path is not None:
        validation = _load(config, config.data.validation_path, tokenizer, "validation data", needs)

    per_epoch = steps_per_epoch(len(data), keys.global_batch_size)
    limits = [config.trainer.max_steps, config.trainer.max_epochs and config.trainer.max_epochs * per_epoch]
    resume_from = last_checkpoint(run_dir(config)) if config.exp_manager.resume_if_exists else None
    start_from = None
    if keys.restore_from_path is not None:
        start_from = resolve_checkpoint(keys.restore_from_path, "model.restore_from_path")
    _check_model(config, len(tokenizer), start_from, resume_from)
    return Prepared(
        train=data,
        validation=validation,
        objective_config=objective.resolve(objective_config(config), _known(data.reward_mean())),
        max_steps=min(limit for limit in limits if limit is not None),
        resume_from=resume_from,
        start_from=start_from,
    )


def _load(config: RunConfig, paths: Any, tokenizer: Any, label: str, needs: Mapping[str, Any]) -> PreferenceData:
    # None: hidden unless stderr is a terminal, from which the bar is removed: there an error stands alone too.
    hidden = None if is_first_rank() and config.trainer.enable_progress_bar else True
    with tqdm(desc=label, unit="row", leave=False, disable=hidden) as bar:
        data = load_preferences(paths, tokenizer, progress=lambda rows: bar.update(rows - bar.n) and None, **needs)
    say(f"{label}: {data.report}")
    return data


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _check_model(config: RunConfig, num_tokens: int, start_from: Path | None, resume_from: Path | None) -> None:
    import_nemo()
    from nemo_rao.integration import build

    made = build.model_config(config)
    check_architecture(
        config,
        num_layers=made.num_layers,
        hidden_size=made.hidden_size,
        ffn_hidden_size=made.ffn_hidden_size,
        num_attention_heads=made.num_attention_heads,
        num_query_groups=made.num_query_groups,
        kv_channels=made.kv_channels,
    )
    if made.vocab_size is not None and made.vocab_size < num_tokens:
        raise UserError(
            f"data.tokenizer has {num_tokens} tokens, more than the {made.vocab_size} of {config.model.config_class}; "
            "name the tokenizer that belongs to the model"
        )
    vocab_size = made.vocab_size or num_tokens
    fitting = "set model.config_class, model.arch and data.tokenizer to the checkpoint's"
    if start_from is not None:
        check_checkpoint(start_from, made, vocab_size, key="model.restore_from_path", remedy=fitting)
    if resume_from is not None:
        other = f"{fitting}, or give this run another exp_manager.name"
        key = f"exp_manager.name={config.exp_manager.name}"
        check_checkpoint(resume_from, made, vocab_size, key=key, remedy=other)


def run_rank(config: RunConfig, prepared: Prepared) -> None:
    """One rank's part of a run; its place is in the environment."""
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from nemo import lightning as nl
    from nemo.lightning.pytorch.strategies.utils import RestoreConfig
    from nemo.lightning.resume import AdapterPath
    from nemo.utils import AppState
    from nemo.utils import logging as nemo_logging

    from nemo_rao.integration import build
    from nemo_rao.integration.callbacks import KeepSchedule, Metrics, Progress, ReferencePass, SeedEveryStep, Validation
    from nemo_rao.integration.data_module import AlignmentData, AlignmentDataModule

    quiet_third_parties()
    nemo_logging.setLevel(nemo_logging.WARNING)
    if config.trainer.threads_per_rank is not None:
        torch.set_num_threads(config.trainer.threads_per_rank)
    # The one place where NeMo reads how long ranks wait for each other.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(config.trainer.timeout_minutes * 60)))
    torch.manual_seed(config.trainer.seed)  # initial weights
    folder, keys = run_dir(config), config.model
    model = build.model(config, prepared.objective_config, prepared.max_steps)

    def with_padding(data: PreferenceData) -> AlignmentData:
        padding = pad_token_id(model.tokenizer.tokenizer)
        return AlignmentData(data, pad_token_id=padding, pad_multiple=build.pad_multiple(config))

    data_sets = {"training": with_padding(prepared.train)}
    if prepared.validation is not None:
        data_sets["validation"] = with_padding(prepared.validation)
    module = AlignmentDataModule(
        data_sets["training"],
        micro_batch_size=keys.micro_batch_size,
        global_batch_size=keys.global_batch_size,
        seq_length=keys.seq_length,
        seed=config.data.seed if config.data.shuffle else None,
    )

    callbacks: list[Any] = [SeedEveryStep(config.trainer.seed)]
    if model.model_transform is not None:
        # Adds the adapters after the reference pass, which so sees the model that they start from.
        callbacks.append(model.model_transform)
    if model.objective.needs_reference:
        callbacks.append(
            ReferencePass(
                data_sets,
                cache_dir=reference_dir(config),
                precision=config.precision.params,
                micro_batch_size=config.reference.micro_batch_size or keys.micro_batch_size,
                micro_batches_per_part=config.reference.save_every,
                vocab_size=model.vocab_size,
            )
        )
    callbacks += [KeepSchedule(), Metrics(folder)]
    if "validation" in data_sets:
        callbacks.append(
            Validation(
                data_sets["validation"],
                every_n_steps=config.trainer.val_check_interval,
                micro_batch_size=keys.micro_batch_size,
                folder=folder,
            )
        )
    if config.trainer.enable_progress_bar:
        callbacks.append(Progress())

    loggers: list[Any] = [TensorBoardLogger(folder, name="tensorboard", version="")]
    if config.exp_manager.create_wandb_logger:
        wandb_keys = dataclasses.asdict(config.exp_manager.wandb_logger_kwargs)
        wandb_keys["name"] = wandb_keys["name"] or config.exp_manager.name
        loggers.append(WandbLogger(save_dir=folder, **wandb_keys))

    trainer = nl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        max_steps=prepared.max_steps,
        max_epochs=-1,
        strategy=build.strategy(config),
        plugins=build.precision(config),
        callbacks=[build.checkpoint_callback(config, folder)],
        logger=loggers,
        log_every_n_steps=config.trainer.log_every_n_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # validation is a callback: it sees every prompt once, however many ranks there are
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accumulate_grad_batches=1,
    )
    # Set after construction: NeMo copies and stores a trainer's arguments with every checkpoint, and these hold the
    # data. They come first, so that a checkpoint sees the step's metrics.
    trainer.callbacks[:0] = callbacks
    trainer.strategy.cluster_environment = (
        SLURMEnvironment(auto_requeue=False) if started_externally() == "slurm" else TorchElasticEnvironment()
    )
    AppState().log_dir = folder
    if prepared.start_from is not None and prepared.resume_from is None:
        trainer.strategy.restore_config = RestoreConfig(path=str(prepared.start_from))
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


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.rename(path)
