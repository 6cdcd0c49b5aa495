"""What may change when a run of an existing name resumes: one rule for train, sweeps, compare-rewards and launch.

A run records its recipe, its data and its start in its directory. The next start is compared with this record:

    changes that keep the numbers    logging, checkpoints, length, parallelism, layouts: applied and recorded
    changes of the numbers           refused, unless exp_manager.resume_with_changes=true: then applied and recorded
    changes of the network           refused: the checkpoint cannot be loaded into another one

:data:`KEEPS_NUMBERS` and :data:`NEEDS_NEW_RUN` declare the effect of keys. A key in neither changes the numbers, so a
new key is refused until it is declared harmless. Files are compared by content, not by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.checkpoint.run_records import (
    CHANGES,
    RECIPE,
    Change,
    ended_without_checkpoint,
    has_results,
    read_data_record,
    read_run,
)
from nemo_rao.config.architecture import architecture_fields, family_of
from nemo_rao.config.derived import objective_config, run_dir
from nemo_rao.config.engine_choice import KEY as ENGINE
from nemo_rao.config.engine_choice import NEMO, installed_engine
from nemo_rao.config.model_config import ArchitectureConfig
from nemo_rao.config.run_config import RunConfig
from nemo_rao.config.typed_config import load_recipe
from nemo_rao.errors import UserError
from nemo_rao.objectives import registry

START = "model.restore_from_path"
ANYWAY = "exp_manager.resume_with_changes"

# Keys, or prefixes of keys, that do not change a run's numbers, except for rounding.
KEEPS_NUMBERS = (
    # Length: the learning rate schedule follows it.
    *("trainer.max_steps", "trainer.max_epochs"),
    # Logging, checkpoints, patience.
    *("exp_manager.", "trainer.val_check_interval", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
    *("trainer.timeout_minutes", "model.allow_pickle", "model.allow_random_weights"),
    # Ranks, and how model and batch are split over them.
    *("trainer.engine", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.threads_per_rank"),
    *("trainer.profile_steps", "model.cpu_offloading_num_layers"),
    *("model.micro_batch_size", "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"),
    *("model.virtual_pipeline_model_parallel_size", "model.context_parallel_size", "model.expert_model_parallel_size"),
    *("model.expert_tensor_parallel_size", "model.sequence_parallel", "model.recompute_", "model.fused_log_probs"),
    *("model.optim.overlap_", "model.arch.make_vocab_size_divisible_by"),
    *("data.packing", "data.prefix_sharing", "data.pad_to_multiple_of"),
    # Caches, and files compared by content (:func:`check_data`, and the start in :mod:`starting`).
    *("data.cache", "data.strict", "data.train_path", "data.validation_path", "data.tokenizer", "reference."),
    *("data.columns", "data.ignore_fields", "data.bad_rows", "data.max_bad_rows"),
    # How samples are computed and shown, without changing them.
    *("online.rows_at_once", "online.scoring_attempts", "online.log_samples"),
    *("online.vllm_python", "online.vllm_gpus", "online.vllm_memory"),
    START,
)
# Keys whose change prevents resuming, mostly because the checkpoint could not be loaded.
NEEDS_NEW_RUN = (
    *("model.family", "model.config_class", "model.arch.", "model.peft.scheme", "model.peft.lora.dim"),
    *("model.peft.lora.target_modules", "model.optim.use_distributed_optimizer", "model.optim.name"),
    *("precision.params", "precision.fp8", "model.ppo.critic_path"),
    *("online.mini_batches", "online.epochs"),  # determine the numbers of rollouts, by which the run finds them
)
# Keys of samples and rewards: the run may still train on a rollout that was made with the old values.
_OF_SAMPLES = "online."
_NOT_OF_SAMPLES = "online.vllm_importance_cap"
_NO_SIZES = (
    *("model.arch.attention_dropout", "model.arch.hidden_dropout", "model.arch.rotary_base"),
    "model.arch.rope_scaling.",
)
# Keys that describe the network; several combinations can describe the same one.
_NETWORK = ("model.family", "model.config_class", "model.arch.")


def settings_changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Return the keys in which two recipes differ, ignoring keys of objectives that neither of them trains."""
    blocks = {f"model.{name}." for name in registry.OBJECTIVES} - {
        f"model.{config.model.objective}." for config in (before, now)
    }
    old, new = flat_keys(dataclasses.asdict(before)), flat_keys(dataclasses.asdict(now))
    if any(old.get(key) != new.get(key) for key in {*old, *new} if key.startswith(_NETWORK)):
        old, new = _with_network(old, before), _with_network(new, now)
    missing = object()
    found = []
    for key in dict.fromkeys([*new, *old]):
        if old.get(key, missing) == new.get(key, missing) or key.startswith(tuple(blocks)):
            continue
        found.append(
            Change(
                key,
                old.get(key),
                new.get(key),
                keeps_numbers=key.startswith(KEEPS_NUMBERS),
                loads=_loads(key, before, now),
            )
        )
    return found


def _with_network(keys: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Replace the keys that determine the network (a family's sizes, or a class of NeMo) by its fields."""
    fields, sizes = architecture_fields(config), {field.name for field in dataclasses.fields(ArchitectureConfig)}
    described = {f"model.arch.{name if name in sizes else f'extra.{name}'}": value for name, value in fields.items()}
    family = family_of(config)
    kind = {"model.config_class": config.model.config_class} if family is None else {"model.family": family}
    others = {key: value for key, value in keys.items() if not key.startswith(_NETWORK)}
    return {**others, **kind, **flat_keys({name: _plain(value) for name, value in described.items()})}


def _plain(value: Any) -> Any:
    """Convert a value to what YAML would read."""
    return list(value) if isinstance(value, tuple) else value


def _loads(key: str, before: RunConfig, now: RunConfig) -> bool:
    if key in ("model.objective", "model.ppo.critic"):
        return _heads(before) == _heads(now)
    if key == "model.optim.lr" or key.endswith(".value_lr"):
        return _heads(now)[0] is None  # Megatron identifies a value head's optimizer state by the ratio of the two
    return key.startswith((*_NO_SIZES, *KEEPS_NUMBERS)) or not key.startswith(NEEDS_NEW_RUN)


def _heads(config: RunConfig) -> tuple[Any, ...]:
    needs = registry.get(config.model.objective).needs_of(objective_config(config))
    return needs.values, needs.scores, needs.critic


def check_settings(config: RunConfig, folder: Path | None = None, *, another: str = "exp_manager.name") -> list[Change]:
    """Compare a recipe with the one that a run of its name has recorded. Reads no data; writes nothing.

    Args:
        folder: directory of the run, if this machine sees it under another path than the recipe states.
        another: the key or option that selects another output directory, for messages.

    Returns:
        the changes that are applied when the run resumes; empty if there is nothing to resume.

    Raises:
        UserError: a change is refused, or ``exp_manager.resume_if_exists=false`` would mix results of two runs.
    """
    folder = folder or run_dir(config)
    if not has_results(folder):
        return []
    if not config.exp_manager.resume_if_exists:
        if last_checkpoint(folder) is None:
            return []
        raise UserError(
            f"exp_manager.resume_if_exists=false: {folder} has checkpoints of an earlier run, which would mix with "
            f"those of a new one. Use another {another}, or remove that directory."
        )
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise UserError(
            f"{folder}: {RECIPE} is missing, so the settings of its checkpoints are unknown. Restore it, or use "
            f"another {another}."
        )
    _check_engine(config, folder, another)
    changes = settings_changes(load_recipe(recipe), config)
    refuse(changes, config, folder, another)
    return changes


def _check_engine(config: RunConfig, folder: Path, another: str) -> None:
    """Refuse to resume a run on another engine: the optimizer state differs between engines."""
    began_on = read_run(folder).get("engine", NEMO)  # the only engine of earlier versions
    asked = config.trainer.engine
    now = installed_engine() if asked == "auto" else asked
    if now is not None and now != began_on:
        raise UserError(
            f"{ENGINE}={asked}: {folder} was trained with {began_on} and would resume with {now}. Set "
            f"{ENGINE}={began_on} where it is installed, or use another {another} (model.restore_from_path={folder} "
            "starts from its weights)."
        )


def check_data(config: RunConfig, record: Mapping[str, Any], *, another: str = "exp_manager.name") -> list[Change]:
    """Compare a run's data with the record of an earlier start.

    Args:
        record: result of :func:`data_record` for the current data.
        another: see :func:`check_settings`.

    Raises:
        UserError: the data differs, and the recipe does not allow changes.
    """
    folder = run_dir(config)
    if not has_results(folder):
        return []
    before, changes = read_data_record(folder), []
    for name, key in (("training", "data.train_path"), ("validation", "data.validation_path")):
        old, new = before.get(name), record.get(name)
        if before and _differ(old, new):
            changes.append(Change(key, _described(old), _described(new), keeps_numbers=_harmless(old, new, config)))
    refuse(changes, config, folder, another)
    return changes


def _differ(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    if one is None or other is None:
        return one is not other
    # Before fingerprints covered the whole contents, only that of the tokens was recorded.
    name = "contents" if "contents" in one and "contents" in other else "fingerprint"
    return one[name] != other[name]


def _harmless(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, config: RunConfig) -> bool:
    """Removed validation data changes no numbers, nor does new data that needs no reference pass."""
    if old is not None and new is not None:
        return False
    needs = registry.get(config.model.objective).needs_of(objective_config(config))
    return new is None or not needs.reference


def _described(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return "none"
    return f"{data['num_prompts']} prompts (contents {data.get('contents', data['fingerprint'])[:12]})"


def refuse(changes: list[Change], config: RunConfig, folder: Path, another: str = "exp_manager.name") -> None:
    """Raise for changes that cannot be applied, or are not allowed."""
    refused = [change for change in changes if not change.loads]
    remedy = f"use another {another}"
    if not refused and not config.exp_manager.resume_with_changes:
        refused = [change for change in changes if not change.keeps_numbers]
        remedy += f", or set {ANYWAY}=true to resume and record the change"
    if refused:
        checkpoint = last_checkpoint(folder)
        at = "is finished" if checkpoint is None else f"resumes from {checkpoint.name}"
        listed = ", ".join(f"{change.key} from {_shown(change.old)} to {_shown(change.new)}" for change in refused)
        raise UserError(f"{folder} {at}, but this command changes {listed}; {remedy}.")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def describe(changes: list[Change]) -> list[str]:
    """Return lines that report the applied changes."""
    if not changes:
        return []
    listed = ", ".join(f"{change.key} {_shown(change.old)} -> {_shown(change.new)}" for change in changes)
    if not all(change.keeps_numbers for change in changes):
        note = f" ({ANYWAY}=true; recorded in {CHANGES})"
    elif any(change.key.startswith(_SPLITS) for change in changes):
        note = " (numbers agree to rounding, not bit for bit)"
    else:
        note = ""
    lines = [f"changed since the last start: {listed}{note}"]
    if any(
        change.key.startswith(_OF_SAMPLES) and not change.keeps_numbers and change.key != _NOT_OF_SAMPLES
        for change in changes
    ):
        lines.append("the current rollout keeps its samples and rewards; the next one uses the change")
    return lines


# Of the keys that keep the numbers, those that reorder sums.
_SPLITS = (
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "model.micro_batch_size", "model.recompute_"),
    *("model.tensor_", "model.pipeline_", "model.virtual_", "model.context_", "model.expert_", "model.sequence_"),
    *("model.fused_log_probs", "data.packing", "data.prefix_sharing", "data.pad_to_multiple_of"),
)


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested groups to dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping) and value
        found |= flat_keys(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def finished_at(config: RunConfig, max_steps: int) -> int | None:
    """Return the step at which a run of this name has finished, if this recipe adds none; else ``None``.

    Args:
        max_steps: optimizer steps of the recipe on the current data.
    """
    folder = run_dir(config)
    if not config.exp_manager.resume_if_exists:
        return None
    ended, checkpoint = read_run(folder).get("finished_at"), last_checkpoint(folder)
    if checkpoint is None:
        reached = ended if ended_without_checkpoint(folder) else None
    else:
        # Without finished_at, the run was stopped after its last checkpoint but before its end was recorded.
        reached = None if ended is None else min(ended, step_of(checkpoint))
    return reached if reached is not None and reached >= max_steps else None
