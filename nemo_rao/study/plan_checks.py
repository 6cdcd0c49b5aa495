"""Checks of a plan: across runs when it is created, and of every run before the first step."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

from nemo_rao.checkpoint.continuing import check_settings
from nemo_rao.checkpoint.run_records import has_results
from nemo_rao.config.checks import check_keys_are_read, made_by
from nemo_rao.config.derived import run_dir
from nemo_rao.errors import UserError, did_you_mean, errors_at
from nemo_rao.study.planned import Plan, PlannedData, StudyRun
from nemo_rao.study.recipe_keys import key_value, override_text
from nemo_rao.training.checks import check_run

# Keys that a study sets itself -> what to give instead.
_SET_BY_STUDY = {
    "exp_manager.exp_dir": "give --out, or the study's key out",
    "exp_manager.name": "runs are named by arm and seed",
    "model.restore_from_path": "give the arm's start",
    "trainer.seed": "give seeds",
    "data.seed": "give seeds",
    "online.seed": "give seeds",
}


def refuse_keys_of_study(where: str, keys: Iterable[str]) -> None:
    """Refuse overrides of keys that the study sets for each run.

    Args:
        where: the mapping that contains them, for errors.

    Raises:
        UserError: the first such key.
    """
    for key in keys:
        if (remedy := _SET_BY_STUDY.get(key)) is not None:
            raise UserError(f"{where}.{key}: is set by the study; {remedy}.")


def check_common(made: Plan) -> None:
    """Refuse a common key that no arm reads."""
    one_of_each = list({run.arm: run for run in made.runs}.values())
    for key, value in made.study.keys.common.items():
        refusals = []
        for run in one_of_each:
            try:
                check_keys_are_read([override_text(key, value)], run.config)
            except UserError as error:
                refusals.append(error)
        if len(refusals) == len(one_of_each):
            raise UserError(f"common.{key}: no arm reads it ({refusals[0]}).")


def check_runs_differ(made: Plan) -> None:
    """Refuse two arms that would train the same run."""
    seen: dict[str, str] = {}
    for arm in made.study.arms:
        config = copy.deepcopy(made.runs_of(arm)[0].config)
        config.exp_manager.name = ""
        earlier = seen.setdefault(repr(config), arm)
        if earlier != arm:
            raise UserError(f"arms.{arm}: is the same run as arms.{earlier}. Change a key, or remove one of them.")


def check_relations(made: Plan) -> None:
    """Refuse relations over keys that an arm does not have."""
    for name, relation in made.study.relations.items():
        for arm in relation.arms or made.compared:
            key_value(made.runs_of(arm)[0].config, relation.over, f"relations.{name}.over")


def check(made: Plan) -> None:
    """Check every run as far as possible before the study's own data and runs exist. Writes nothing.

    Raises:
        UserError: on the first mistake, with the study file and the arm.
    """
    with errors_at(str(made.study.path)):
        present = {step.name: _exists(step) for step in made.steps}
        data = {step.name for step in made.steps if isinstance(step, PlannedData)}
        for run in made.runs:
            with errors_at(f"arms.{run.arm}"):
                absent = {name for name in run.needs if not present[name]}
                start = run.config.model.restore_from_path
                if start is not None and run.start is None and not Path(start).expanduser().is_dir():
                    near = did_you_mean(start, made.study.arms, otherwise=f"; set arms.{run.arm}.start to one.")
                    remedy = near if (target := made_by(start)) is None else f"; {target}."
                    raise UserError(f"start: {start} is neither an arm nor the directory of a checkpoint{remedy}")
                check_run(run.config, start_exists=not absent, data_exists=not absent & data)
                check_settings(run.config, another="--out")


def _exists(step: StudyRun | PlannedData) -> bool:
    if isinstance(step, PlannedData):
        return step.path.exists()
    return has_results(run_dir(step.config))
