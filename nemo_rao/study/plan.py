"""From a study file to runs: what is made and trained, in which order, and with which recipe.

    Study -> references {NAME} -> order -> a PlannedRun for each arm and seed -> checks

Reads recipes and the names of files, no data; writes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import graphlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_rao.checkpoint.continuing import check_settings
from nemo_rao.checkpoint.run_records import has_results
from nemo_rao.config.checks import check_keys_are_read
from nemo_rao.config.compose import compose
from nemo_rao.config.derived import run_dir
from nemo_rao.config.run_config import RunConfig
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.study.study_file import Arm, Made, Scored, Study
from nemo_rao.training.checks import check_run
from nemo_rao.training.several_runs import PlannedRun, told_of

# Keys that a study sets itself -> what to give instead.
SET_HERE = {
    "exp_manager.exp_dir": "give --out, or the key out",
    "exp_manager.name": "runs are named by arm and seed",
    "model.restore_from_path": "give the arm's start",
    "trainer.seed": "give seeds",
    "data.seed": "give seeds",
    "online.seed": "give seeds",
}
_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")
_PLAIN = re.compile(r"[A-Za-z0-9_./:+-]+")  # what Hydra reads as written


@dataclass(frozen=True)
class StudyRun(PlannedRun):
    """A run of a study.

    Attributes:
        arm: its name.
        seed: of the run; of one that is trained once, the study's first.
        recipe, overrides: what ``nemo-rao train`` would be given.
        needs: names of the runs and of the data that must be there first.
        start: name of the run that it starts from; ``None``: of none.
    """

    arm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...]
    start: str | None


@dataclass(frozen=True)
class PlannedData:
    """Data that a study makes.

    Attributes:
        name: as in the file.
        spec: with its references resolved.
        path: a directory (:class:`Made`) or a file of rows (:class:`Scored`).
        needs: see :class:`StudyRun`.
    """

    name: str
    spec: Made | Scored
    path: Path
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All that a study does, in order.

    Attributes:
        folder: of runs, data, samples and report.
        steps: each behind what it needs.
    """

    study: Study
    folder: Path
    steps: tuple[StudyRun | PlannedData, ...]

    @property
    def runs(self) -> list[StudyRun]:
        return [step for step in self.steps if isinstance(step, StudyRun)]

    def runs_of(self, arm: str) -> list[StudyRun]:
        return [run for run in self.runs if run.arm == arm]

    def run_of(self, arm: str, seed: int) -> StudyRun:
        """The arm's run with this seed, or its only one."""
        found = self.runs_of(arm)
        return found[0] if self.study.arms[arm].once else next(run for run in found if run.seed == seed)

    @property
    def compared(self) -> list[str]:
        return [name for name, arm in self.study.arms.items() if not arm.once]

    def resolved(self, text: str, where: str) -> str:
        """A value of ``samples`` or ``tasks``, with references to data and to arms that are trained once."""
        return _filled(text, {name: self._path(name) for name in _names(text, self.study, where, of_seed=False)})

    def _path(self, name: str) -> str:
        if name in self.study.files:
            return next(str(step.path) for step in self.steps if isinstance(step, PlannedData) and step.name == name)
        return str(run_dir(self.runs_of(name)[0].config))


def plan(study: Study, out: str | None = None) -> Plan:
    """Composes all runs.

    Args:
        out: directory of the results; ``None``: the file's, or ``runs/study/NAME``.

    Raises:
        UserError: names the study file and the key.
    """
    folder = Path(out or study.keys.out or f"runs/study/{study.name}").expanduser()
    with told_of(str(study.path)):
        made = Plan(study, folder, tuple(_steps(study, folder)))
        _check_common(study, made.runs)
        _check_different(made)
        if study.samples is not None:
            for key, text in (("prompts", study.samples.prompts), ("scorer", study.samples.scorer)):
                made.resolved(text, f"samples.{key}")
        for name, relation in study.relations.items():
            for arm in relation.arms or made.compared:
                for run in made.runs_of(arm)[:1]:
                    key_value(run.config, relation.over, f"relations.{name}.over")
    return made


def check(made: Plan) -> None:
    """Checks every run as far as that is possible before the study's own data and runs are there. Writes nothing.

    Raises:
        UserError: the first mistake, with the study file and the arm.
    """
    with told_of(str(made.study.path)):
        present = {step.name: _is_there(step) for step in made.steps}
        made_data = {step.name for step in made.steps if isinstance(step, PlannedData)}
        for run in made.runs:
            with told_of(f"arms.{run.arm}"):
                absent = {name for name in run.needs if not present[name]}
                start = run.config.model.restore_from_path
                if start is not None and run.start is None and not Path(start).expanduser().is_dir():
                    raise UserError(
                        f"start: {start} is neither an arm nor the directory of a "
                        f"checkpoint; set arms.{run.arm}.start to one{did_you_mean(start, made.study.arms)}"
                    )
                check_run(run.config, start_exists=not absent, data_exists=not absent & made_data)
                check_settings(run.config, another="--out")


def key_value(config: RunConfig, over: str, where: str) -> float | str:
    """The value of a key, or of ``1/KEY``, for a relation; text where it is no number (``auto``).

    Raises:
        UserError: there is no such key, or it is a group.
    """
    inverse = over.startswith("1/")
    found: Any = config
    for part in over.removeprefix("1/").split("."):
        known = vars(found) if dataclasses.is_dataclass(found) else {}
        if part not in known:
            raise UserError(f"{where}: {over}: no such key{did_you_mean(part, known)}")
        found = known[part]
    if dataclasses.is_dataclass(found):
        raise UserError(f"{where}: {over} is a group of keys; name one of them")
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return str(found)
    if inverse and found == 0:
        raise UserError(f"{where}: {over}: the key is 0, which has no inverse")
    return 1 / found if inverse else float(found)


# --------------------------------------------------------------------------------------------------------------- order


def _steps(study: Study, folder: Path) -> Iterator[StudyRun | PlannedData]:
    """Runs seed by seed, so that every arm has some result early; what they need before them."""
    needs = {name: _needs_of_arm(study, name) for name in study.arms}
    needs |= {name: _needs_of_data(study, name) for name in study.files}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        raise UserError(f"arms: {' -> '.join(error.args[1])} need each other; remove one reference") from None
    paths = {
        name: folder / "data" / (name if isinstance(spec, Made) else f"{name}.jsonl")
        for name, spec in study.files.items()
    }
    composed: dict[tuple[str, tuple[str, ...]], RunConfig] = {}
    for number, seed in enumerate(study.keys.seeds):
        for name in order:
            shared = name in study.files or study.arms[name].once
            if number and shared:
                continue
            if name in study.files:
                spec = _resolved(
                    study.files[name], {need: _place(study, folder, paths, need, None) for need in needs[name]}
                )
                yield PlannedData(name, spec, paths[name], tuple(_run_name(study, need, None) for need in needs[name]))
            else:
                yield _run(study, folder, paths, name, seed, needs[name], composed)


def _needs_of_arm(study: Study, name: str) -> list[str]:
    arm = study.arms[name]
    found = [arm.start] if arm.start is not None and arm.start in study.arms else []
    for key, value in arm.set.items():
        found += _names(value, study, f"arms.{name}.set.{key}")
    for key, value in study.keys.common.items():
        of_common = _names(value, study, f"common.{key}", of_seed=False)
        if of_arms := [need for need in of_common if need in study.arms]:
            raise UserError(f"common.{key}: {{{of_arms[0]}}} is an arm itself; set the key in the arms that need it")
        found += of_common if key not in arm.set else []
    needs = list(dict.fromkeys(found))
    for need in needs:
        if need in study.arms and arm.once and not study.arms[need].once:
            raise UserError(
                f"arms.{name}: is trained once, but needs {need}, which is trained for every seed; set "
                f"arms.{need}.once, or leave it out here"
            )
    return needs


def _needs_of_data(study: Study, name: str) -> list[str]:
    return _names(dataclasses.asdict(study.files[name]), study, f"files.{name}", of_seed=False)


def _names(value: Any, study: Study, where: str, *, of_seed: bool = True) -> list[str]:
    """References in a value, which may be nested.

    Args:
        of_seed: arms that are trained for every seed may be among them.
    """
    found = []
    for text in _texts(value):
        for name in _REFERENCE.findall(text):
            known = [*study.arms, *study.files]
            if name not in known:
                raise UserError(
                    f"{where}: {{{name}}} is neither an arm nor files of this study{did_you_mean(name, known)}; there "
                    f"are {', '.join(known)}"
                )
            if not of_seed and name in study.arms and not study.arms[name].once:
                raise UserError(f"{where}: {{{name}}} is trained for every seed; set arms.{name}.once: true")
            found.append(name)
    return list(dict.fromkeys(found))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _texts(one)


def _filled(value: Any, paths: Mapping[str, str]) -> Any:
    """The value with paths in the place of references."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: paths.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {name: _filled(one, paths) for name, one in value.items()}
    return [_filled(one, paths) for one in value] if isinstance(value, list) else value


def _resolved(spec: Made | Scored, paths: Mapping[str, str]) -> Made | Scored:
    return type(spec)(**_filled(dataclasses.asdict(spec), paths))


def _run_name(study: Study, name: str, seed: int | None) -> str:
    """Of an arm's run; data keeps its name."""
    is_shared = name in study.files or study.arms[name].once
    return name if is_shared else f"{name}-seed{seed}"


def _place(study: Study, folder: Path, paths: Mapping[str, Path], name: str, seed: int | None) -> str:
    return str(paths[name] if name in paths else folder / _run_name(study, name, seed))


def _is_there(step: StudyRun | PlannedData) -> bool:
    if isinstance(step, PlannedData):
        return step.path.exists()
    return has_results(run_dir(step.config))


# ---------------------------------------------------------------------------------------------------------------- runs


def _run(
    study: Study,
    folder: Path,
    paths: Mapping[str, Path],
    name: str,
    seed: int,
    needs: Sequence[str],
    composed: dict[tuple[str, tuple[str, ...]], RunConfig],
) -> StudyRun:
    """One run.

    Args:
        composed: recipes by their overrides, which most seeds share; what is composed is added.
    """
    arm = study.arms[name]
    places = {need: _place(study, folder, paths, need, seed) for need in needs}
    start = None if arm.start is None else places.get(arm.start, _filled(arm.start, places))
    given = {**study.keys.common, **arm.set}
    _refuse_set_here(name, study, arm)
    texts = [_text(key, _filled(value, places)) for key, value in given.items()]
    texts += [] if start is None else [_text("model.restore_from_path", start)]
    own_keys = [_text(key, _filled(value, places)) for key, value in arm.set.items()]
    with told_of(f"arms.{name}"):
        identity = (arm.recipe, tuple(texts))
        if identity not in composed:
            composed[identity] = compose(arm.recipe, texts, study.keys.config_dir)
            check_keys_are_read(own_keys, composed[identity])
    config = copy.deepcopy(composed[identity])
    run_name = _run_name(study, name, seed)
    of_study = {
        "exp_manager.exp_dir": str(folder),
        "exp_manager.name": run_name,
        "trainer.seed": seed,
        "data.seed": seed,
    }
    config.exp_manager.exp_dir, config.exp_manager.name = str(folder), run_name
    config.trainer.seed = config.data.seed = seed
    if config.online.num_generations is not None:
        of_study["online.seed"] = config.online.seed = seed
    return StudyRun(
        run_name,
        run_name,
        config,
        arm=name,
        seed=seed,
        recipe=arm.recipe,
        overrides=(*texts, *(_text(key, value) for key, value in of_study.items())),
        needs=tuple(_run_name(study, need, seed) for need in needs),
        start=_run_name(study, arm.start, seed) if arm.start is not None and arm.start in study.arms else None,
    )


def _text(key: str, value: Any) -> str:
    """An override of the command line."""
    if isinstance(value, str):
        if _PLAIN.fullmatch(value):
            return f"{key}={value}"
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'
    if isinstance(value, Mapping):
        return f"{key}={{{','.join(_text(name, one).replace('=', ':', 1) for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"{key}=[{','.join(_text('', one)[1:] for one in value)}]"
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}"


# -------------------------------------------------------------------------------------------------------------- checks


def _refuse_set_here(name: str, study: Study, arm: Arm) -> None:
    for where, values in (("common", study.keys.common), (f"arms.{name}.set", arm.set)):
        for key in values:
            if (remedy := SET_HERE.get(key)) is not None:
                raise UserError(f"{where}.{key}: is set by the study; {remedy}")


def _check_common(study: Study, runs: Sequence[StudyRun]) -> None:
    """Refuses a common key that no arm reads."""
    one_of_each = list({run.arm: run for run in runs}.values())
    for key, value in study.keys.common.items():
        refusals = []
        for run in one_of_each:
            try:
                check_keys_are_read([_text(key, value)], run.config)
            except UserError as error:
                refusals.append(error)
        if len(refusals) == len(one_of_each):
            raise UserError(f"common.{key}: no arm reads it ({refusals[0]})")


def _check_different(made: Plan) -> None:
    """Refuses two arms that would train the same run."""
    seen: dict[str, str] = {}
    for arm in made.study.arms:
        config = copy.deepcopy(made.runs_of(arm)[0].config)
        config.exp_manager.name = ""
        earlier = seen.setdefault(repr(config), arm)
        if earlier != arm:
            raise UserError(f"arms.{arm}: is the same run as arms.{earlier}; change a key, or remove one of them")
