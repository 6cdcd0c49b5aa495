"""The recipes of conf/ for NeMo-Run, so that NeMo's own launcher lists and runs them.

    nemo rao train --help
    nemo rao train --factory gpt_rao data.train_path=prefs.jsonl data.tokenizer=./tokenizer model.rao.beta=0.2
    nemo rao train --factory 'gpt_rao(model=llama3_8b, precision=bf16_mixed)' run.executor=slurm data.train_path=...

Or in Python, where an executor is an object:

    task = recipe("gpt_rao", model="llama3_8b", precision="bf16_mixed")
    task.data.train_path = "/data/prefs.jsonl"
    run.run(task, executor=run.SlurmExecutor(...))

A recipe is composed here as everywhere, its groups (``model=llama3_8b``) being arguments of the factory; it becomes a
``run.Partial`` of :func:`train` with every key of a run in it, to be set by the name that it has in YAML. What has
been set is checked as everywhere too: by the launcher before it starts or submits anything, and again where it runs.

Loaded by the launcher through the entry-point group ``nemo_run.cli``; nothing of NeMo or Megatron is imported here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import fiddle
import nemo_run as run

from nemo_rao.config.compose import compose, override, package_recipes, recipe_names
from nemo_rao.config.model_config import ModelConfig
from nemo_rao.config.moved_recipes import MOVED_RECIPES, REMOVED_IN, replacement
from nemo_rao.config.online_config import OnlineConfig
from nemo_rao.config.run_config import (
    DataConfig,
    ExpManagerConfig,
    PrecisionConfig,
    ReferenceConfig,
    RunConfig,
    TrainerConfig,
)
from nemo_rao.errors import RankFailure, UserError, report

NAMESPACE = "rao"  # of the commands: nemo rao train; the entry point in pyproject.toml has the same name


class OverriddenByKey(run.cli.RunContext):
    """NeMo-Run's handling of a command line, but ``key=value`` means what it means to ``nemo-rao train``.

    NeMo-Run would read a value by the key's annotation alone, and leave ranges to the job, hours later in a queue.
    """

    def parse_fn(self, fn: Callable, args: list[str], **default_kwargs: Any) -> run.Partial:
        try:
            task = super().parse_fn(fn, [], **default_kwargs)
            return _task(override(run_config(task), args))
        except UserError as error:
            raise SystemExit(report(error)) from None


@run.cli.entrypoint(namespace=NAMESPACE, run_ctx_cls=OverriddenByKey)
def train(
    trainer: TrainerConfig,
    exp_manager: ExpManagerConfig,
    model: ModelConfig,
    data: DataConfig,
    precision: PrecisionConfig,
    reference: ReferenceConfig,
    online: OnlineConfig,
) -> None:
    """Train a model with the objective and the data that a recipe names.

    Start from a recipe (--factory gpt_rao) and set its keys by name (model.rao.beta=0.2). All keys with their
    comments: nemo-rao train --config-name gpt_rao --print-config.

    Args:
        trainer, exp_manager, model, data, precision, reference, online: the groups of keys of a run.
    """
    try:
        config = override(RunConfig(trainer, exp_manager, model, data, precision, reference, online), [])
        from nemo_rao.training.checks import check_run
        from nemo_rao.training.train import train as run_training

        check_run(config)
        run_training(config)
    except (UserError, RankFailure) as error:
        raise SystemExit(report(error)) from None


def recipe(name: str, *, config_dir: str | None = None, **groups: str) -> run.Partial:
    """A recipe as a task for NeMo-Run: its keys are attributes, ``task.model.rao.beta``.

    Args:
        name: of a file in conf/, or in ``config_dir``.
        config_dir: a directory of the user's own recipes, searched first.
        groups: another file of a group, such as ``model="llama3_8b"``.

    Raises:
        UserError: no such recipe, group or file.
    """
    return _task(compose(name, [f"{group}={choice}" for group, choice in groups.items()], config_dir))


def run_config(task: run.Partial) -> RunConfig:
    """The run that a task describes, checked.

    Raises:
        UserError: a value of another type or out of its range, or a group of keys that is not set.
    """
    given = fiddle.build(task).keywords
    for field in dataclasses.fields(RunConfig):
        if field.name not in given:
            names = [name for name in FACTORIES if name not in MOVED_RECIPES]
            raise UserError(f"{field.name} is not set; start from a recipe: --factory {' or '.join(names)}")
    return override(RunConfig(**given), [])


def _task(config: RunConfig) -> run.Partial:
    return run.Partial(train, **{name: _buildable(section) for name, section in vars(config).items()})


def _buildable(config: Any) -> run.Config:
    """A config object as NeMo-Run wants it: what to call, with what, to be changed until it is built."""
    return run.Config(
        type(config),
        **{n: _buildable(value) if dataclasses.is_dataclass(value) else value for n, value in vars(config).items()},
    )


def _factory(name: str, about: str) -> Callable[..., run.Partial]:
    def make(**groups: str) -> run.Partial:
        return recipe(name, **groups)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = about
    return run.cli.factory(make, target=train, name=name)


def _first_line(name: str) -> str:
    return (package_recipes() / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")


def _about_old_name(old: str) -> str:
    now, overrides = replacement(old)
    return f"Until {REMOVED_IN}, another name of {' '.join([now, *overrides])}."


# --factory NAME
FACTORIES = {name: _factory(name, _first_line(name)) for name in recipe_names([package_recipes()])}
FACTORIES |= {old: _factory(old, _about_old_name(old)) for old in MOVED_RECIPES}
