"""From the part file to the output: standardize the columns, average them to ``reward``, collect statistics.

    column as written  =  (standardized column - shift) / scale
    reward             =  weighted mean of the columns as written

Standardization: ``none``: unchanged; ``global``: minus the column's mean, divided by its standard deviation, both over
the whole file (or taken from another file's statistics); ``prompt``: the same over the responses of a prompt. If all
are equal they become 0. A response that lacks a column has no reward, since a mean of the others would not be
comparable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_rao.errors import UserError
from nemo_rao.rows.fields import LARGEST_REWARD
from nemo_rao.runtime.files import written_atomically
from nemo_rao.runtime.part_file import PartFile
from nemo_rao.scoring.missing import WITHOUT, Missing
from nemo_rao.scoring.notes import NOTES
from nemo_rao.scoring.scorer import Scores, ScoringFailure

STANDARDIZE = ("none", "global", "prompt")


@dataclass(frozen=True)
class Scaling:
    """Conversion of columns to rewards.

    Attributes:
        standardize: one of ``STANDARDIZE``.
        shift, scale: applied after standardization.
        weights: column -> its weight in the mean.
        stated: column -> (mean, sd) for ``global``; empty: computed from the file.
    """

    standardize: str = "none"
    shift: float = 0.0
    scale: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    stated: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def check(self, columns: Sequence[str]) -> None:
        """Raise if the settings cannot be applied to these columns."""
        if not math.isfinite(self.shift):
            raise UserError(f"--shift {self.shift}: must be finite")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"--scale {self.scale:g}: must be > 0 and finite")
        for name, weight in self.weights.items():
            if name not in columns:
                raise UserError(f"--weight {name}={weight:g}: no such scorer. Use one of {', '.join(columns)}.")
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"--weight {name}={weight:g}: must be >= 0 and finite")
        if not sum(self.weights.get(name, 1.0) for name in columns) > 0:
            raise UserError("--weight: all weights are 0, but at least one must be > 0")

    @property
    def changes_nothing(self) -> bool:
        """Whether a single column equals the reward."""
        return (self.standardize, self.shift, self.scale) == ("none", 0.0, 1.0)

    def columns(self, raw: Mapping[str, Scores], means: Mapping[str, tuple[float, float]]) -> dict[str, Scores]:
        """Scale one row's columns; ``means``: column -> (mean, sd) over the file."""
        scaled = {}
        for name, scores in raw.items():
            mean, sd = 0.0, 1.0
            if self.standardize == "global":
                mean, sd = means[name]
            elif self.standardize == "prompt":
                mean, sd = _mean_and_sd([score for score in scores if score is not None])
            divisor = sd if sd > 0 else 1.0
            scaled[name] = tuple(
                None if score is None else ((score - mean) / divisor - self.shift) / self.scale for score in scores
            )
        return scaled

    def reward(self, columns: Sequence[tuple[str, float | None]]) -> float | None:
        """Weighted mean of one response's columns; those of weight 0 may be missing."""
        weighted = [(self.weights.get(name, 1.0), score) for name, score in columns]
        weighted = [(weight, score) for weight, score in weighted if weight > 0]
        total = math.fsum(weight for weight, _ in weighted)
        if any(score is None for _, score in weighted):
            return None
        return math.fsum(weight / total * score for weight, score in weighted if score is not None)


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    if not values or min(values) == max(values):  # rounding could give a nonzero deviation
        return (values[0] if values else 0.0), 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def stated_statistics(path: str, columns: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(mean, sd) of each column from another output's ``.stats.json``."""
    try:
        found = json.loads(Path(path).expanduser().read_text())["columns"]
        return {name: (float(found[name]["mean"]), float(found[name]["sd"])) for name in columns}
    except OSError as error:
        raise UserError(f"--statistics {path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise UserError(
            f"--statistics {path}: has no {error} for the columns {', '.join(columns)}. Pass the .stats.json of an "
            "output with these columns."
        ) from None
    except (ValueError, TypeError):
        raise UserError(f"--statistics {path}: is not a .stats.json of nemo-rao score. Pass one.") from None


def write_output(
    part: PartFile,
    output: Path,
    names: Sequence[str],
    scaling: Scaling,
    missing: Missing,
    notes: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Write OUTPUT and OUTPUT.stats.json, each atomically. Returns the statistics.

    Args:
        part: all rows with their columns.
        output: the file to write.
        names: names of the columns.
        scaling: conversion of columns to rewards.
        missing: responses without a score.
        notes: column -> note -> count.

    Raises:
        UserError: the disk is full.
        ScoringFailure: a reward is too large.
    """
    from nemo_rao.scoring.statistics import Collector

    statistics_path = output.with_name(f"{output.name}.stats.json")
    before, after = Collector(names), Collector(["reward"])
    for record in part.records():
        before.add(_columns(record, names), bool(record.get("ranked")))
    statistics = before.as_json()
    of_file = {name: (one["mean"], one["sd"]) for name, one in statistics["columns"].items() if one["count"]}
    means = dict.fromkeys(names, (0.0, 1.0)) | of_file | dict(scaling.stated)
    # The output last: if it exists, so do its statistics.
    with written_atomically(statistics_path, output) as (statistics_file, file):
        for number, record in enumerate(part.records(), start=1):
            record.pop(WITHOUT, None)
            record.pop(NOTES, None)
            _put_rewards(record, names, scaling, means, f"{output} row {number}")
            after.add({"reward": _scores(record, "reward")}, bool(record.get("ranked")))
            file.write((json.dumps(record) + "\n").encode())
        rewards = after.as_json()
        statistics = {
            "rows": part.num_records,
            "standardize": scaling.standardize,
            "standardized_by": {name: {"mean": means[name][0], "sd": means[name][1]} for name in names}
            if scaling.standardize == "global"
            else None,
            "shift": scaling.shift,
            "scale": scaling.scale,
            "weights": {name: scaling.weights.get(name, 1.0) for name in names},
            "columns": statistics["columns"],
            "reward": rewards["columns"]["reward"],
            "without_score": missing.as_json(),
            "notes": notes,
            "agreement_with_labels": statistics["agreement_with_labels"] | rewards["agreement_with_labels"],
            "agreement_between": statistics["agreement_between"],
        }
        statistics_file.write((json.dumps(statistics, indent=2) + "\n").encode())
    return statistics


def _scores(record: Mapping[str, Any], name: str) -> Scores:
    return tuple(response[name] for response in record["responses"])


def _columns(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Scores]:
    return {name: _scores(record, name) for name in names}


def _put_rewards(
    record: dict[str, Any],
    names: Sequence[str],
    scaling: Scaling,
    means: Mapping[str, tuple[float, float]],
    location: str,
) -> None:
    """Store the scaled columns and ``reward`` in the record's responses."""
    columns = scaling.columns(_columns(record, names), means)
    for number, response in enumerate(record["responses"]):
        own = {name: columns[name][number] for name in names}
        reward = scaling.reward(list(own.items()))
        for value in (*own.values(), reward):
            if value is not None and not abs(value) <= LARGEST_REWARD:
                raise ScoringFailure(
                    f"{location}, response {number + 1}: a reward of {value:g} is too large. Choose another --scale."
                )
        rest = {name: value for name, value in response.items() if name not in own}
        response.clear()
        response.update({"content": rest.pop("content"), "reward": reward} | own | rest)
