"""Load a study file as a checked :class:`Study`.

    file, or name of a shipped study -> values (:mod:`nemo_rao.study.yaml_values`) -> typed sections -> checks

Everything that depends on the file alone is checked here. Recipes are composed in :mod:`nemo_rao.study.plan`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_rao.config.compose import package_recipes
from nemo_rao.errors import UserError, did_you_mean, errors_at
from nemo_rao.keys import make
from nemo_rao.study.schema import (
    Arm,
    Files,
    Made,
    Measure,
    Relation,
    Samples,
    Scored,
    Split,
    Study,
    StudyFile,
    Tasks,
    label_of,
)
from nemo_rao.study.yaml_values import STUDIES, override, read_values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Directories of a study; runs must not have these names.
_DIRECTORIES = ("data", "samples", "tasks", "exported", "logs", "figures", "reference", "tokenised")
Section = TypeVar("Section", bound="DataclassInstance")


def load_study(given: str, overrides: Sequence[str] = ()) -> Study:
    """Read and checks a study file.

    Args:
        given: a file, or the name of one of the package's studies.
        overrides: ``key=value``: a key of the study, such as ``seeds=[1,2]`` or ``arms.sft.start=runs/sft``, or a key
            of recipes, which is put into ``common``.

    Raises:
        UserError: names the file and the key.
    """
    path = _find(given)
    values = read_values(path)
    for text in overrides:
        override(values, text)
    with errors_at(str(path)):
        return dataclasses.replace(_study(path, values), overrides=tuple(overrides))


def _find(given: str) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    own = package_recipes() / STUDIES
    shipped = sorted(file.stem for file in own.glob("[!_]*.yaml"))  # _NAME: only extended by others
    if path.stem in shipped and path.parent == Path("."):
        return own / f"{path.stem}.yaml"
    near = did_you_mean(path.stem, shipped, otherwise=".")
    raise UserError(f"study {given}: no such file{near} The studies are {', '.join(shipped)}.")


def _study(path: Path, values: Mapping[str, Any]) -> Study:
    keys = _section(StudyFile, values, "")
    if not keys.arms:
        raise UserError("arms: is empty. Add at least one, such as arms: {rao: {recipe: gpt_rao}}.")
    if not keys.seeds:
        raise UserError("seeds: is empty. Give at least one, such as [1, 2, 3].")
    if len(set(keys.seeds)) < len(keys.seeds):
        raise UserError(f"seeds: {keys.seeds} has a seed twice, which would count one run as two. Give each once.")
    arms = {name: _section(Arm, value, f"arms.{name}") for name, value in keys.arms.items()}
    files = {name: _file(name, value) for name, value in keys.files.items()}
    _check_names(arms, files)
    compared = [name for name, arm in arms.items() if not arm.once]
    _check_arms(arms, compared)
    if keys.baseline is not None and keys.baseline not in compared:
        raise UserError(f"baseline: {_not_compared(keys.baseline, compared)}")
    measures = {
        name: _section(Measure, value if isinstance(value, dict) and "metric" in value else {"metric": value}, where)
        for name, value in keys.measures.items()
        for where in [f"measures.{name}"]
    }
    for name, measure in measures.items():
        _check_metric(f"measures.{name}", measure.metric)
    relations = {name: _section(Relation, value, f"relations.{name}") for name, value in keys.relations.items()}
    for name, relation in relations.items():
        _check_relation(f"relations.{name}", relation, measures, compared)
    samples = None if keys.samples is None else _section(Samples, keys.samples, "samples")
    if samples is not None:
        _check_samples(samples, keys, compared, arms)
    tasks = None if keys.tasks is None else _section(Tasks, keys.tasks, "tasks")
    if tasks is not None and not tasks.names:
        raise UserError("tasks.names: is empty. Name tasks of lm-evaluation-harness, or remove tasks.")
    return Study(path, path.stem, keys, files, arms, measures, relations, samples, tasks)


def _section(kind: type[Section], values: Any, where: str) -> Section:
    """Convert a mapping to a checked instance of ``kind``."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a mapping of keys to values.")
    return make(kind, values, where)


def _file(name: str, value: Any) -> Files:
    where = f"files.{name}"
    if isinstance(value, dict) and "function" in value:
        return _section(Made, value, where)
    if isinstance(value, dict) and "split" in value:
        return _section(Split, value, where)
    made = _section(Scored, value, where)
    if not (made.input and made.scorer):
        raise UserError(f"{where}: needs input and scorer, or split, or function.")
    return made


def _check_names(arms: Mapping[str, Arm], files: Mapping[str, Files]) -> None:
    if both := sorted(arms.keys() & files.keys()):
        raise UserError(f"files.{both[0]}: an arm has the same name. Rename one of them.")
    for name in [*arms, *files]:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise UserError(f"{name!r}: becomes a directory name. Use letters, digits, '_' and '-'.")
    for name, arm in arms.items():
        if arm.once and name in _DIRECTORIES:
            raise UserError(f"arms.{name}: the study itself uses a directory of this name. Rename the arm.")


def _check_arms(arms: Mapping[str, Arm], compared: Sequence[str]) -> None:
    for name, arm in arms.items():
        if not arm.recipe:
            raise UserError(f"arms.{name}.recipe: is missing. Name a recipe, such as gpt_rao.")
    if not compared:
        raise UserError("arms: all are trained once. Remove `once` from the arms to compare.")
    labels: dict[str, str] = {}
    for name in compared:
        other = labels.setdefault(label := label_of(name, arms[name]), name)
        if other != name:
            raise UserError(f"arms.{name}: is labeled {label!r} in the report, like arms.{other}. Change one label.")


def _not_compared(name: str, compared: Sequence[str]) -> str:
    near = did_you_mean(name, compared, otherwise=".")
    return f"{name} is not an arm that is compared{near} Compared arms are {', '.join(compared)}."


def _check_metric(where: str, metric: Any) -> None:
    if isinstance(metric, str) and metric:
        return
    numbers = isinstance(metric, dict) and all(
        isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool)
        for name, value in metric.items()
    )
    if not numbers or not metric:
        raise UserError(
            f"{where}: must be a metric, such as val/loss, or {{metric: coefficient}}, such as "
            "{val/rewards/chosen: 0.5, val/rewards/rejected: 0.5}"
        )


def _check_relation(where: str, relation: Relation, measures: Mapping[str, Measure], compared: list[str]) -> None:
    if relation.measure not in measures:
        near = did_you_mean(relation.measure, measures, otherwise=".")
        raise UserError(
            f"{where}.measure: {relation.measure!r} is not among the measures{near} The measures are "
            f"{', '.join(measures) or 'none'}."
        )
    if not relation.over:
        raise UserError(f"{where}.over: is missing. Name a key, such as model.rao.log_z0.")
    for name in relation.arms:
        if name not in compared:
            raise UserError(f"{where}.arms: {_not_compared(name, compared)}")


def _check_samples(samples: Samples, keys: StudyFile, compared: list[str], arms: Mapping[str, Arm]) -> None:
    for name, value, remedy in (
        ("prompts", samples.prompts, "Name a file with prompts, such as prompts.jsonl."),
        ("scorer", samples.scorer, "Name one, such as model:runs/rm or judge:judge.yaml."),
    ):
        if not value:
            raise UserError(f"samples.{name}: is missing. {remedy}")
    if samples.temperature == 0 and samples.num_responses > 1:
        raise UserError(
            f"samples.temperature=0: gives the same response {samples.num_responses} times. Raise it, or set "
            "samples.num_responses=1."
        )
    for name in ("start", "baseline"):
        if name in arms and (name == "start" or keys.baseline != "baseline"):
            raise UserError(f"arms.{name}: has a special meaning in samples.against. Rename the arm.")
    for name in samples.against:
        if name == "baseline" and keys.baseline is None:
            raise UserError("samples.against: baseline is not set. Set it, or name an arm or start.")
        if name not in ("baseline", "start", *arms):
            known = ["baseline", "start", *arms]
            near = did_you_mean(name, known, otherwise=".")
            raise UserError(
                f"samples.against: {name} is neither an arm nor baseline nor start{near} Known names are "
                f"{', '.join(known)}."
            )
    if "start" in samples.against and (without := [name for name in compared if arms[name].start is None]):
        raise UserError(f"samples.against: start needs arms.{without[0]}.start. Set it, or remove start.")
