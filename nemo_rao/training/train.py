"""Train a run from its recipe to its last checkpoint: the parent prepares and starts the ranks, each rank trains."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_rao.checkpoint.continuing import check_settings, describe
from nemo_rao.checkpoint.find import last_checkpoint, step_of
from nemo_rao.checkpoint.run_records import DATA, RECIPE, data_record, record_changes, write_run
from nemo_rao.checkpoint.starting import describe_heads, describe_start
from nemo_rao.config.derived import run_dir
from nemo_rao.config.engine_choice import engine_name
from nemo_rao.config.recipe_text import to_yaml
from nemo_rao.config.run_config import RunConfig
from nemo_rao.engines.engine import engine_of
from nemo_rao.loop.prepared import Prepared
from nemo_rao.runtime.console import is_first_rank, quiet_third_parties, say
from nemo_rao.runtime.curves import draw_curves
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.gpus import CPU_NOTICE
from nemo_rao.runtime.launch import launch
from nemo_rao.training.devices import check_ranks_started, select_device
from nemo_rao.training.prepare import prepare
from nemo_rao.training.ranks import train_rank
from nemo_rao.training.targets import say_targets

if TYPE_CHECKING:
    from nemo_rao.loop.session import Hook


def as_they_are(hooks: list[Hook]) -> list[Hook]:
    return hooks


def train(
    config: RunConfig, *, hooks: Callable[[list[Hook]], list[Hook]] = as_they_are, in_children: bool = False
) -> None:
    """Train according to the recipe; resume if an earlier run of this name was interrupted.

    Args:
        config: a composed and checked recipe (:func:`nemo_rao.training.checks.check_run`).
        hooks: maps the default hooks around the run's steps to those to use; called on every rank.
        in_children: run even a single rank in a separate process, so that another run can follow in this one
            (Megatron keeps batch sizes and process groups).

    Raises:
        UserError: the data, the model's sizes or a checkpoint do not fit; raised before a model is built.
        RankFailure: a rank failed.
    """
    quiet_third_parties()
    check_ranks_started(config)
    engine = engine_of(config)  # fails if it is not installed, before anything is written
    select_device(config)
    changes, folder = check_settings(config), run_dir(config)
    prepared = prepare(config)
    if prepared.finished_at is not None:
        asked = "" if prepared.finished_at == prepared.max_steps else f" (this recipe asks for {prepared.max_steps})"
        say(f"{folder}: finished at step {prepared.finished_at} of {prepared.finished_at}{asked}: nothing to do")
        return
    if engine.load():
        say(CPU_NOTICE)
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
    record = functools.partial(_record_start, config, prepared)
    launch(
        train_rank,
        (config, prepared, record, hooks),
        num_ranks=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        in_children=in_children,
    )
    if is_first_rank():
        say(f"checkpoint   {last_checkpoint(folder) or 'none kept'}")
        say(f"TensorBoard  {folder / 'tensorboard'}")
        say(f"metrics      {folder / 'metrics.jsonl'}")
        if config.exp_manager.draw_curves:
            say(f"curves       {draw_curves(folder)}")
        _write_run(config, prepared, finished_at=prepared.max_steps, continues=True)


def _record_start(config: RunConfig, prepared: Prepared) -> None:
    """Write the run's recipe, data and start, and what has changed since its last start."""
    folder = run_dir(config)
    write_atomically(folder / RECIPE, to_yaml(config))
    write_atomically(folder / DATA, json.dumps(data_record(prepared.train, prepared.validation), indent=2) + "\n")
    _write_run(config, prepared, continues=prepared.resume_from is not None)
    record_changes(folder, prepared.changes, 0 if prepared.resume_from is None else step_of(prepared.resume_from))


def _write_run(config: RunConfig, prepared: Prepared, *, continues: bool, finished_at: int | None = None) -> None:
    write_run(
        run_dir(config),
        engine=engine_name(config),
        start_from=prepared.start_from,
        max_steps=prepared.max_steps,
        finished_at=finished_at,
        continues=continues,
    )
