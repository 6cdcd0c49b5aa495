"""A study as its YAML file describes it: arms, seeds, data to make, and what is measured.

    title, about           what the report says of it
    extends: [FILE, ...]   studies beside this file, or of the package; later ones, and this one, replace their keys
    common: {key: value}   overrides of every arm, keys of recipes or groups such as model
    seeds: [1, 2, 3]       each arm is trained once with each
    baseline: NAME         the arm that differences are taken against
    files: {NAME: ...}     what the study makes before it trains             (:class:`Made`, :class:`Scored`)
    arms: {NAME: ...}      what is trained                                   (:class:`Arm`)
    measures, curves, relations, samples, tasks                              what the report shows

``{NAME}`` in a value stands for the path of those files, or for the directory of that arm's run with the same seed.
Arms and files are made in the order that these references ask for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nemo_rao.config.compose import package_recipes
from nemo_rao.errors import UserError, did_you_mean
from nemo_rao.keys import check, key

STUDIES = "study"  # directory of the package's own, beside its recipes
_DIRECTORIES = ("data", "samples", "tasks", "exported", "logs", "figures", "reference", "tokenised")
Section = TypeVar("Section")


@dataclass
class Arm:
    """One of the things compared, or a run that others start from."""

    recipe: str = key("", "recipe, such as gpt_rao")
    label: str | None = key(None, "name in tables and figures; null: the arm's")
    start: str | None = key(
        None, "arm that it starts from, or a checkpoint; null: model.restore_from_path of the recipe"
    )
    once: bool = key(False, "trained once, with the first seed, for all seeds; not compared with other arms")
    set: dict[str, Any] = key({}, "overrides of this arm")


@dataclass
class Made:
    """A directory filled by a Python function, called as ``function(directory, **arguments)``."""

    function: str = key("", "module:function; it is imported and executed, so use only code that you trust")
    arguments: dict[str, Any] = key({}, "keyword arguments")


@dataclass
class Scored:
    """A file of rows whose rewards come from scorers, as ``nemo-rao score`` writes it."""

    input: str = key("", "rows to score")
    scorer: list[str] = key([], "[NAME=]KIND:WHAT, as --scorer")
    weight: list[str] = key([], "NAME=W, as --weight")
    standardize: str = key("none", "as --standardize", choices=("none", "global", "prompt"))
    shift: float = key(0.0, "as --shift")
    scale: float = key(1.0, "as --scale", low=0, exclusive=True)


@dataclass
class Measure:
    """A number for each run: a linear combination of metrics."""

    metric: Any = key(None, "a metric of metrics.jsonl, or {metric: coefficient}, which is summed")
    of: str = key("last", "last: last value; change: last less first", choices=("last", "change"))
    better: str | None = key(None, "direction that is an improvement", choices=(None, "higher", "lower"))


@dataclass
class Relation:
    """A regression over runs: how a measure depends on a key."""

    measure: str = key("", "one of measures")
    over: str = key("", "key of the recipe, such as model.rao.log_z0; 1/KEY for its inverse")
    arms: list[str] = key([], "arms to include; empty: all that are compared")
    expected: float | None = key(None, "slope that theory predicts, shown beside the estimate")


@dataclass
class Samples:
    """Responses sampled from each policy, and who wins."""

    prompts: str = key("", "rows with prompts, in any training format")
    scorer: str = key("", "[NAME=]KIND:WHAT, as --scorer of nemo-rao score")
    against: list[str] = key(["baseline"], "baseline, start, or names of arms")
    num_responses: int = key(4, "samples of each prompt", low=1)
    temperature: float = key(1.0, "divides the logits; 0: greedy", low=0.0)
    max_new_tokens: int = key(512, "tokens a sample may have", low=1)
    batch_size: int = key(32, "sequences generated at once", low=1)
    seed: int = key(1234, "of sampling; the same for every policy", low=0)
    engine: str = key("auto", "what generates", choices=("auto", "transformers", "vllm"))
    resamples: int = key(3, "how often an unreadable response is sampled again", low=0)
    log_ratio: bool = key(
        False,
        "also compute the mean log-ratio of a policy's samples to its reference, an estimate of the KL divergence, for "
        "objectives with a reference and a beta",
    )


@dataclass
class Tasks:
    """Tasks of lm-evaluation-harness, run on each policy."""

    names: list[str] = key([], "tasks, such as gsm8k")
    limit: int | None = key(None, "only the first examples of each task", low=1)
    num_fewshot: int | None = key(None, "solved examples before each question; null: the task's own", low=0)
    batch_size: int = key(32, "sequences at once", low=1)
    apply_chat_template: bool = key(False, "apply the chat template to questions")
    include_path: str | None = key(None, "directory with tasks of your own")


@dataclass
class StudyFile:
    """See the module."""

    title: str = key("", "heading of the report")
    about: str = key("", "question of the study, shown below the heading")
    out: str | None = key(None, "directory of runs and report; null: runs/study/NAME")
    config_dir: str | None = key(None, "directory with your own recipes, searched first")
    common: dict[str, Any] = key({}, "overrides of every arm")
    seeds: list[int] = key([1, 2, 3], "seeds; each arm is trained once with each", low=0)
    baseline: str | None = key(None, "arm that differences are taken against")
    curves: list[str] = key([], "metrics drawn over steps; empty: those that are usual and there")
    files: dict[str, Any] = key({}, "files to make")
    arms: dict[str, Any] = key({}, "what is trained")
    measures: dict[str, Any] = key({}, "columns of the table; empty: held-out loss and accuracy, log-probabilities")
    relations: dict[str, Any] = key({}, "regressions over runs")
    samples: Any = key(None, "responses to sample and judge")
    tasks: Any = key(None, "tasks of lm-evaluation-harness")


@dataclass(frozen=True)
class Study:
    """A study file, typed.

    Attributes:
        path: of the file.
        keys: of its top level, as given.
        overrides: of the command line, which ``keys`` hold already.
    """

    path: Path
    name: str
    keys: StudyFile
    files: Mapping[str, Made | Scored]
    arms: Mapping[str, Arm]
    measures: Mapping[str, Measure]
    relations: Mapping[str, Relation]
    samples: Samples | None
    tasks: Tasks | None
    overrides: tuple[str, ...] = ()


def load_study(given: str, overrides: Sequence[str] = ()) -> Study:
    """Reads and checks a study file, as far as it alone can tell.

    Args:
        given: a file, or the name of one of the package's studies.
        overrides: ``key=value``: a key of the study, such as ``seeds=[1,2]`` or ``arms.sft.start=runs/sft``, or a key
            of recipes, which is put into ``common``.

    Raises:
        UserError: names the file and the key.
    """
    path = _find(given)
    values = _merged(path, [])
    for text in overrides:
        _override(values, text)
    try:
        return dataclasses.replace(_study(path, values), overrides=tuple(overrides))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def label_of(name: str, arm: Arm) -> str:
    return arm.label or name


def _find(given: str) -> Path:
    path = Path(given).expanduser()
    if path.is_file():
        return path
    own = package_recipes() / STUDIES
    shipped = sorted(file.stem for file in own.glob("[!_]*.yaml"))  # _NAME: to be extended
    if path.stem in shipped and path.parent == Path("."):
        return own / f"{path.stem}.yaml"
    raise UserError(f"study {given}: no such file{did_you_mean(path.stem, shipped)}; studies are {', '.join(shipped)}")


def _study(path: Path, values: Mapping[str, Any]) -> Study:
    keys = _section(StudyFile, values, "")
    if not keys.arms:
        raise UserError("arms: there are none; add at least one, such as arms: {rao: {recipe: gpt_rao}}")
    if not keys.seeds:
        raise UserError("seeds: is empty; give at least one, such as [1, 2, 3]")
    if len(set(keys.seeds)) < len(keys.seeds):
        raise UserError(f"seeds: {keys.seeds} has a seed twice, which would count one run as two; give each once")
    arms = {name: _section(Arm, value, f"arms.{name}") for name, value in keys.arms.items()}
    files = {name: _file(name, value) for name, value in keys.files.items()}
    if both := sorted(arms.keys() & files.keys()):
        raise UserError(f"files.{both[0]}: an arm has the same name; rename one of them")
    for name in [*arms, *files]:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
            raise UserError(f"{name!r}: becomes a directory; use letters, digits, '_' and '-'")
    for name, arm in arms.items():
        if arm.once and name in _DIRECTORIES:
            raise UserError(f"arms.{name}: the study has a directory of this name itself; rename the arm")
        if not arm.recipe:
            raise UserError(f"arms.{name}.recipe: is missing; name a recipe, such as gpt_rao")
    compared = [name for name, arm in arms.items() if not arm.once]
    if not compared:
        raise UserError("arms: all are trained once; leave out `once` where arms are to be compared")
    if keys.baseline is not None and keys.baseline not in compared:
        raise UserError(
            f"baseline: {keys.baseline} is not an arm that is compared{did_you_mean(keys.baseline, compared)}; there "
            f"are {', '.join(compared)}"
        )
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
        raise UserError("tasks.names: is empty; name tasks of lm-evaluation-harness, or leave tasks out")
    return Study(path, path.stem, keys, files, arms, measures, relations, samples, tasks)


def _section(kind: type[Section], values: Any, where: str) -> Section:
    """A mapping as an instance of ``kind``, checked."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a mapping of keys and values")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            full = f"{where}.{name}" if where else name
            raise UserError(f"{full}: unknown key{did_you_mean(str(name), known)}; there are {', '.join(known)}")
    made = kind(**values)
    check(made, where)
    return made


def _file(name: str, value: Any) -> Made | Scored:
    where = f"files.{name}"
    if isinstance(value, dict) and "function" in value:
        return _section(Made, value, where)
    made = _section(Scored, value, where)
    if not (made.input and made.scorer):
        raise UserError(f"{where}: needs input and scorer, or function")
    return made


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
        raise UserError(
            f"{where}.measure: {relation.measure!r} is not one of measures"
            f"{did_you_mean(relation.measure, measures)}; there are {', '.join(measures) or 'none'}"
        )
    if not relation.over:
        raise UserError(f"{where}.over: is missing; name a key, such as model.rao.log_z0")
    for name in relation.arms:
        if name not in compared:
            raise UserError(
                f"{where}.arms: {name} is not an arm that is compared{did_you_mean(name, compared)}; there are "
                f"{', '.join(compared)}"
            )


def _check_samples(samples: Samples, keys: StudyFile, compared: list[str], arms: Mapping[str, Arm]) -> None:
    for name, value in (("prompts", samples.prompts), ("scorer", samples.scorer)):
        if not value:
            raise UserError(f"samples.{name}: is missing")
    if samples.temperature == 0 and samples.num_responses > 1:
        raise UserError(
            f"samples.temperature=0: gives the same response {samples.num_responses} times; raise it, or set "
            "samples.num_responses=1"
        )
    for name in samples.against:
        if name == "baseline" and keys.baseline is None:
            raise UserError("samples.against: baseline, but none is set; set baseline, or name an arm or start")
        if name not in ("baseline", "start", *arms):
            known = ["baseline", "start", *arms]
            raise UserError(
                f"samples.against: {name} is neither an arm nor baseline nor start{did_you_mean(name, known)}; there "
                f"are {', '.join(known)}"
            )
    if "start" in samples.against and (without := [name for name in compared if arms[name].start is None]):
        raise UserError(f"samples.against: start, but arms.{without[0]}.start is not set; set it, or leave start out")


def _override(values: dict[str, Any], text: str) -> None:
    """Sets one key of a study, or of ``common``."""
    name, equals, given = text.partition("=")
    if not name or not equals:
        raise UserError(f"{text!r} is not an override; write key=value, such as seeds=[1,2]")
    try:
        value = yaml.safe_load(given)
    except yaml.YAMLError:  # {NAME}/file
        value = given
    if isinstance(value, dict) and None in value.values():  # {NAME}
        value = given
    parts = name.split(".")
    if parts[0] not in {field.name for field in dataclasses.fields(StudyFile)}:
        parts = ["common", name]
    elif parts[0] == "common":
        parts = ["common", ".".join(parts[1:])]
    elif parts[0] == "arms" and parts[2:3] == ["set"]:
        parts = [*parts[:3], ".".join(parts[3:])]
    inside = values
    for part in parts[:-1]:
        if not isinstance(inside.setdefault(part, {}), dict):
            raise UserError(f"{text}: {part} has no keys of its own")
        inside = inside[part]
    inside[parts[-1]] = value


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML's own loader keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<
                continue
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: {name} is given twice; rename or remove one")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)  # derived of SafeLoader
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping with arms, such as arms: {{rao: {{recipe: gpt_rao}}}}")
    return values


def _merged(path: Path, above: list[Path]) -> dict[str, Any]:
    """The values of a file over those of the files that it extends, of which later ones win."""
    values = _read(path)
    below: dict[str, Any] = {}
    extends = values.pop("extends", None) or []
    for name in [extends] if isinstance(extends, str) else extends:
        places = [folder / name for folder in (path.parent, package_recipes() / STUDIES)]
        places += [place.with_name(f"{place.name}.yaml") for place in places]
        other = next((place for place in places if place.is_file()), None)
        if other is None:
            raise UserError(f"{path}: extends: {name}: no such file beside this one or in conf/{STUDIES}")
        if other.resolve() in [one.resolve() for one in (*above, path)]:
            raise UserError(f"{path}: extends: {name} leads back to this file")
        below = _over(below, _merged(other, [*above, path]))
    return _over(below, values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged, key by key; other values replace; null removes a key."""
    found = dict(below)
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] = _over(found[name], value)
        elif value is None and name in found and isinstance(found[name], dict):
            del found[name]
        else:
            found[name] = value
    return found
