"""What is worked out before a rank exists: data, sizes, checkpoints. Whatever is wrong is said here, once.

In the order of their cost: what the environment tells, then the data, and only then anything that imports NeMo.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao import cpu
from nemo_rao.checkpoint.adapters import base_on_resume, check_resumed_adapters, check_scheme
from nemo_rao.checkpoint.continuing import (
    START,
    Change,
    check_data,
    data_record,
    finished_at,
    needs_start,
    start_of,
)
from nemo_rao.checkpoint.find import check_checkpoint, last_checkpoint
from nemo_rao.checkpoint.starting import FITTING, check_tokenizer
from nemo_rao.config.checks import check_architecture
from nemo_rao.config.derived import (
    objective_config,
    run_dir,
    total_steps,
    world_size,
)
from nemo_rao.config.experts import check_resumed_experts
from nemo_rao.config.precision_checks import FP8, check_gpus_present
from nemo_rao.config.run_config import RunConfig
from nemo_rao.data.mismatched import mismatched
from nemo_rao.data.store import PreferenceData
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry
from nemo_rao.runtime.console import quiet_imports, say
from nemo_rao.runtime.gpus import has_gpu
from nemo_rao.runtime.launch import started_externally
from nemo_rao.training.loading import LoadedData, drawn, load_data


@dataclass(frozen=True)
class Prepared:
    """What every rank needs and the parent has worked out.

    Attributes:
        train, validation: tokenised data.
        mismatched: the same prompts with responses to others, as "train" and "validation"; empty where not needed.
        objective_config: the objective's keys, with what depends on the data resolved.
        max_steps: optimizer steps of the whole run.
        changes: of the data, since an earlier start of the run; they are applied.
        finished_at: steps of a run that has ended and is not to be made longer; its model is not checked.
        resume_from: this run's last checkpoint, or ``None`` at its start.
        start_from: a checkpoint whose weights the run starts with, or ``None``.
    """

    train: PreferenceData
    validation: PreferenceData | None
    mismatched: Mapping[str, PreferenceData]
    objective_config: Any
    max_steps: int
    changes: list[Change]
    finished_at: int | None
    resume_from: Path | None
    start_from: Path | None


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
    import torch

    if not has_gpu():
        if config.trainer.accelerator == "gpu":
            raise UserError("trainer.accelerator is gpu, but this machine has no CUDA device; set it to cpu")
        if config.precision.fp8 is not None and not config.precision.fp8_simulation:
            raise UserError(
                f"{FP8}={config.precision.fp8}: this machine has no CUDA device, and a CPU no 8-bit products; choose "
                "precision=bf16_mixed, or precision.fp8_simulation=true to study the accuracy"
            )
        # Forking after torch has started threads of its own can hang the children.
        torch.set_num_threads(1)
    elif config.trainer.devices > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices={config.trainer.devices}, but this machine has {torch.cuda.device_count()} CUDA devices; "
            "lower it, or set trainer.accelerator=cpu"
        )
    else:
        check_gpus_present(config)


def import_nemo() -> bool:
    """Imports what a run needs of Megatron and NeMo, changed as this machine needs it. Returns whether to run on CPU.

    Not before everything that is wrong with the data has been said: it takes 20 seconds.
    """
    with quiet_imports():
        on_cpu = cpu.install_if_needed()
        from nemo_rao.engines.nemo import build  # noqa: F401

        try:
            from nemo.lightning.callback_group import CallbackGroup
        except ModuleNotFoundError:  # before NeMo 2.6
            return on_cpu
    # NeMo's telemetry is on wherever torchrun has set RANK=0, and then fails at the first checkpoint unless NeMo's own
    # API has described the run to it. It has no exporter anyhow.
    CallbackGroup.get_instance().callbacks.clear()
    return on_cpu


@dataclass(frozen=True)
class PlannedSteps:
    """A run's steps over its data, and whether they have been taken.

    Attributes:
        max_steps, changes, finished_at: see :class:`Prepared`.
    """

    max_steps: int
    changes: list[Change]
    finished_at: int | None


def plan_steps(
    config: RunConfig,
    train: PreferenceData,
    validation: PreferenceData | None,
    *,
    another: str = "exp_manager.name",
) -> PlannedSteps:
    """What a run has to do over its data, and what of it an earlier start has done.

    Args:
        another: the key or option that gives results another folder, for messages.

    Raises:
        UserError: an earlier start had other data.
    """
    changes = check_data(config, data_record(train, validation), another=another)
    max_steps = _max_steps(config, len(train))
    return PlannedSteps(max_steps, changes, finished_at(config, max_steps))


def prepare(config: RunConfig, loaded: LoadedData | None = None) -> Prepared:
    """Everything that can be checked and computed without a model. See :func:`train` for the errors.

    Args:
        loaded: what :func:`load_data` gives, where it is known; it is read otherwise.
    """
    keys, objective = config.model, registry.get(config.model.objective)
    needs = objective.needs_of(objective_config(config))
    loaded = loaded or load_data(config)
    data, validation = drawn(config, loaded), loaded.validation
    others = {}
    if needs.mismatched:
        sources = {"train": data} if validation is None else {"train": data, "validation": validation}
        for name, source in sources.items():
            others[name] = mismatched(source, seq_length=keys.seq_length, seed=config.data.seed)

    resolved = objective.resolve(objective_config(config), data.reward_summary())
    if validation is not None:
        objective.resolve(objective_config(config), validation.reward_summary())
    planned = plan_steps(config, data, validation)
    resume_from = last_checkpoint(run_dir(config)) if config.exp_manager.resume_if_exists else None
    start_from = start_of(config)
    if planned.finished_at is None:
        check_resumed_experts(config, run_dir(config))
        if resume_from is not None:
            check_scheme(config, resume_from)
            if keys.peft.scheme != "none":
                assert start_from is not None  # check_run
                start_from = base_on_resume(resume_from, start_from, f"exp_manager.name={config.exp_manager.name}")
        _check_model(config, loaded.num_tokens, start_from if needs_start(config) else None, resume_from)
    return Prepared(
        train=data,
        validation=validation,
        mismatched=others,
        objective_config=resolved,
        max_steps=planned.max_steps,
        changes=planned.changes,
        finished_at=planned.finished_at,
        resume_from=resume_from,
        start_from=start_from,
    )


def _max_steps(config: RunConfig, num_prompts: int) -> int:
    """Optimizer steps of the run; says so where ``max_epochs`` ends it before ``max_steps``."""
    steps, asked = total_steps(config, num_prompts), config.trainer.max_steps
    if asked is not None and steps < asked:
        say(
            f"trainer.max_steps={asked}, but trainer.max_epochs={config.trainer.max_epochs} ends the run after step "
            f"{steps} ({num_prompts} prompts, model.global_batch_size={config.model.global_batch_size}); "
            "trainer.max_epochs=null leaves it to max_steps"
        )
    return steps


def _check_model(config: RunConfig, num_tokens: int, start_from: Path | None, resume_from: Path | None) -> None:
    import_nemo()
    from nemo_rao.engines.nemo import build

    made = build.model_config(config)
    check_architecture(
        config,
        num_layers=made.num_layers,
        hidden_size=made.hidden_size,
        ffn_hidden_size=None if made.num_moe_experts else made.ffn_hidden_size,  # an expert's is split otherwise
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
    trusted = config.model.allow_pickle
    if start_from is not None:
        check_checkpoint(start_from, made, vocab_size, key=START, remedy=FITTING, trusted=trusted)
        check_tokenizer(config, start_from, num_tokens)
    if resume_from is not None:
        other = f"{FITTING}, or give this run another exp_manager.name"
        key = f"exp_manager.name={config.exp_manager.name}"
        check_checkpoint(resume_from, made, vocab_size, key=key, remedy=other, trusted=trusted)
        check_resumed_adapters(config, resume_from, made.num_layers, experts=bool(made.num_moe_experts))
