"""Turn a study into a plan: what is made and trained, in which order, and with which recipe.

    Study -> references {NAME} -> order -> a StudyRun for each arm and seed -> checks across runs

Reads recipes and file names, but no data; writes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import graphlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_rao.config.checks import check_keys_are_read
from nemo_rao.config.compose import compose
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, errors_at
from nemo_rao.study.plan_checks import check_common, check_relations, check_runs_differ, refuse_keys_of_study
from nemo_rao.study.planned import Layout, Plan, PlannedData, StudyRun
from nemo_rao.study.recipe_keys import override_text
from nemo_rao.study.references import references, resolved
from nemo_rao.study.schema import Files, Study

Composed = dict[tuple[str, tuple[str, ...]], RunConfig]  # recipe and overrides -> config, without seed and names


def plan(study: Study, out: str | None = None) -> Plan:
    """Compose all runs.

    Args:
        out: directory of the results; ``None``: the file's, or ``runs/study/NAME``.

    Raises:
        UserError: names the study file and the key.
    """
    folder = Path(out or study.keys.out or f"runs/study/{study.name}").expanduser()
    with errors_at(str(study.path)):
        layout = Layout(study, folder)
        made = Plan(layout, tuple(_steps(layout)))
        check_common(made)
        check_runs_differ(made)
        check_relations(made)
        if study.samples is not None:
            for key, text in (("prompts", study.samples.prompts), ("scorer", study.samples.scorer)):
                made.resolved(text, f"samples.{key}")
    return made


def _steps(layout: Layout) -> Iterator[StudyRun | PlannedData]:
    """Yield the steps seed by seed, so that every arm has a result early, and each step after its dependencies."""
    study = layout.study
    needs = {name: _needs_of_arm(study, name) for name in study.arms}
    needs |= {name: _needs_of_data(study, name) for name in study.files}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"arms: {' -> '.join(error.args[1])} depend on each other. Remove one reference.") from None
    composed: Composed = {}
    for number, seed in enumerate(study.keys.seeds):
        for name in order:
            if number and layout.is_shared(name):
                continue
            if name in study.files:
                yield _data(layout, name, needs[name])
            else:
                yield _run(layout, name, seed, needs[name], composed)


def _needs_of_arm(study: Study, name: str) -> list[str]:
    """Return the names of the arms and files that an arm refers to."""
    arm = study.arms[name]
    found = [arm.start] if arm.start is not None and arm.start in study.arms else []
    for key, value in arm.set.items():
        found += references(value, study, f"arms.{name}.set.{key}")
    for key, value in study.keys.common.items():
        of_common = references(value, study, f"common.{key}", per_seed=False)
        if of_arms := [need for need in of_common if need in study.arms]:
            raise UserError(f"common.{key}: {{{of_arms[0]}}} is an arm itself. Set the key in the arms that need it.")
        found += of_common if key not in arm.set else []
    needs = list(dict.fromkeys(found))
    for need in needs:
        if need in study.arms and arm.once and not study.arms[need].once:
            raise UserError(
                f"arms.{name}: is trained once, but needs {need}, which is trained with every seed. Set "
                f"arms.{need}.once, or remove it here."
            )
    return needs


def _needs_of_data(study: Study, name: str) -> list[str]:
    return references(dataclasses.asdict(study.files[name]), study, f"files.{name}", per_seed=False)


def _data(layout: Layout, name: str, needs: Sequence[str]) -> PlannedData:
    spec: Files = layout.study.files[name]
    paths = {need: str(layout.path(need, None)) for need in needs}
    spec = type(spec)(**resolved(dataclasses.asdict(spec), paths))
    return PlannedData(name, spec, layout.path(name, None), tuple(layout.step_name(need, None) for need in needs))


def _run(layout: Layout, name: str, seed: int, needs: Sequence[str], composed: Composed) -> StudyRun:
    """Compose one run.

    Args:
        composed: configs that seeds share; a new one is added.
    """
    study, arm = layout.study, layout.study.arms[name]
    refuse_keys_of_study("common", study.keys.common)
    refuse_keys_of_study(f"arms.{name}.set", arm.set)
    paths = {need: str(layout.path(need, seed)) for need in needs}
    own = {key: override_text(key, resolved(value, paths)) for key, value in arm.set.items()}
    common = {key: override_text(key, resolved(value, paths)) for key, value in study.keys.common.items()}
    overrides = list({**common, **own}.values())
    start = None
    if arm.start is not None:
        start = layout.step_name(arm.start, seed) if arm.start in study.arms else None
        checkpoint = arm.start if start is None else str(layout.path(arm.start, seed))
        overrides.append(override_text("model.restore_from_path", checkpoint))
    with errors_at(f"arms.{name}"):
        identity = (arm.recipe, tuple(overrides))
        if identity not in composed:
            composed[identity] = compose(arm.recipe, overrides, study.keys.config_dir)
            check_keys_are_read(list(own.values()), composed[identity])
    config = copy.deepcopy(composed[identity])
    run_name = layout.step_name(name, seed)
    config.exp_manager.exp_dir, config.exp_manager.name = str(layout.folder), run_name
    config.trainer.seed = config.data.seed = seed
    set_here = {
        "exp_manager.exp_dir": str(layout.folder),
        "exp_manager.name": run_name,
        "trainer.seed": seed,
        "data.seed": seed,
    }
    if config.online.num_generations is not None:
        set_here["online.seed"] = config.online.seed = seed
    return StudyRun(
        run_name,
        run_name,
        config,
        arm=name,
        seed=seed,
        recipe=arm.recipe,
        overrides=(*overrides, *(override_text(key, value) for key, value in set_here.items())),
        needs=tuple(layout.step_name(need, seed) for need in needs),
        start=start,
    )
