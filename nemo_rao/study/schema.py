"""Schema of a study's YAML file: the keys with their defaults, and the typed result.

    title, about           heading and question of the report
    extends: [FILE, ...]   studies in this directory or of the package; later ones, and this one, replace their keys
    common: {key: value}   overrides of every arm, keys of recipes or groups such as model
    seeds: [1, 2, 3]       each arm is trained once with each
    baseline: NAME         the arm from which differences are taken
    files: {NAME: ...}     data made before training            (:class:`Made`, :class:`Scored`, :class:`Split`)
    arms: {NAME: ...}      what is trained                                   (:class:`Arm`)
    measures, curves, relations, samples, tasks                              contents of the report

``{NAME}`` in a value stands for the path of those files, or for the directory of that arm's run with the same seed.
Arms and files are made in the order that these references require.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rao.keys import key


@dataclass
class Arm:
    """A recipe that is trained with every seed and compared, or once for others to start from."""

    recipe: str = key("", "recipe, such as gpt_rao")
    label: str | None = key(None, "name in tables and figures; null: the arm's name")
    start: str | None = key(None, "arm or checkpoint to start from; null: model.restore_from_path of the recipe")
    once: bool = key(False, "trained once, with the first seed, for all seeds; not compared with other arms")
    set: dict[str, Any] = key({}, "overrides of this arm")


def label_of(name: str, arm: Arm) -> str:
    """Return the name of an arm in the report."""
    return arm.label or name


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
class Split:
    """A directory with train.jsonl and held_out.jsonl: the rows of one source, split by prompt."""

    split: str = key("", "rows to split, in any form of data.train_path")
    held_out: float = key(0.1, "fraction of prompts that are held out", low=0, high=1, exclusive=True)
    columns: dict[str, Any] = key({}, "as data.columns")


Files = Made | Scored | Split


@dataclass
class Measure:
    """A number per run: a linear combination of metrics."""

    metric: Any = key(None, "a metric of metrics.jsonl, or {metric: coefficient}, which is summed")
    of: str = key("last", "last: last value; change: last minus first", choices=("last", "change"))
    better: str | None = key(None, "direction that is an improvement", choices=(None, "higher", "lower"))


@dataclass
class Relation:
    """A regression over runs: how a measure depends on a key."""

    measure: str = key("", "one of measures")
    over: str = key("", "key of the recipe, such as model.rao.log_z0; 1/KEY for its inverse")
    arms: list[str] = key([], "arms to include; empty: all that are compared")
    expected: float | None = key(None, "slope that theory predicts, shown next to the estimate")


@dataclass
class Samples:
    """Responses sampled from each policy, and their win rates."""

    prompts: str = key("", "rows with prompts, in any training format")
    scorer: str = key("", "[NAME=]KIND:WHAT, as --scorer of nemo-rao score")
    against: list[str] = key(["baseline"], "baseline, start, or names of arms")
    num_responses: int = key(4, "samples of each prompt", low=1)
    temperature: float = key(1.0, "divides the logits; 0: greedy", low=0.0)
    max_new_tokens: int = key(512, "maximum tokens of a sample", low=1)
    batch_size: int = key(32, "sequences generated at once", low=1)
    seed: int = key(1234, "seed of sampling, the same for every policy", low=0)
    engine: str = key("auto", "library that generates", choices=("auto", "transformers", "vllm"))
    resamples: int = key(3, "number of times an unreadable response is sampled again", low=0)
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
    batch_size: int = key(32, "sequences evaluated at once", low=1)
    apply_chat_template: bool = key(False, "apply the chat template to questions")
    include_path: str | None = key(None, "directory with your own tasks")


@dataclass
class StudyFile:
    """The top level of the file; see the module's docstring."""

    title: str = key("", "heading of the report")
    about: str = key("", "question of the study, shown below the heading")
    out: str | None = key(None, "directory of runs and report; null: runs/study/NAME")
    config_dir: str | None = key(None, "directory with your own recipes, searched first")
    common: dict[str, Any] = key({}, "overrides of every arm")
    seeds: list[int] = key([1, 2, 3], "seeds; each arm is trained once with each", low=0)
    baseline: str | None = key(None, "arm that the others are compared with")
    curves: list[str] = key([], "metrics drawn over steps; empty: the usual ones that were logged")
    files: dict[str, Any] = key({}, "data made before training")
    arms: dict[str, Any] = key({}, "what is trained")
    measures: dict[str, Any] = key({}, "columns of the table; empty: held-out loss and accuracy, log-probabilities")
    relations: dict[str, Any] = key({}, "regressions over runs")
    samples: Any = key(None, "responses to sample and judge")
    tasks: Any = key(None, "tasks of lm-evaluation-harness")


@dataclass(frozen=True)
class Study:
    """A typed and checked study file.

    Attributes:
        path: the file.
        name: the file's name without its suffix.
        keys: the top level as given, overrides included; its sections are typed in the attributes below.
        overrides: ``key=value`` of the command line, to repeat the command in the report.
    """

    path: Path
    name: str
    keys: StudyFile
    files: Mapping[str, Files]
    arms: Mapping[str, Arm]
    measures: Mapping[str, Measure]
    relations: Mapping[str, Relation]
    samples: Samples | None
    tasks: Tasks | None
    overrides: tuple[str, ...] = ()
