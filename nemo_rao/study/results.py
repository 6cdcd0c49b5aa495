"""The results of a study as one JSON document: outcomes of runs, their measures, summaries over seeds, win rates.

    results.json    everything in the report except the curves, which are read from each run's metrics.jsonl

It does not depend on when or how often the study was started: an interrupted and resumed study gives the same document.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rao.checkpoint.continuing import flat_keys
from nemo_rao.checkpoint.run_records import read_data_record, read_run, versions_of
from nemo_rao.config.derived import run_dir
from nemo_rao.config.recipe_text import shown
from nemo_rao.config.run_config import RunConfig
from nemo_rao.objectives import registry
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.runtime.source_version import source_version
from nemo_rao.study.measures import USUAL_MEASURES, Records, coefficients, logged, value_of
from nemo_rao.study.planned import Plan, StudyRun
from nemo_rao.study.policies import Policy
from nemo_rao.study.policy_results import Judged, compare, log_ratio, read_judged, task_metrics
from nemo_rao.study.recipe_keys import key_value
from nemo_rao.study.run import Outcome, policies_of, start_policy
from nemo_rao.study.schema import Measure, label_of
from nemo_rao.study.statistics import Estimate, mean, paired_difference, slope

# Keys of a recipe that differ between runs of a study but are not settings of their arm.
_OF_THE_RUN = ("exp_manager.", "trainer.seed", "data.seed", "online.seed", "model.restore_from_path")


def collect(made: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Collect the contents of ``results.json``; missing values are NaN."""
    study = made.study
    records = {run.name: read_metrics(run_dir(run.config) / "metrics.jsonl") for run in made.runs}
    measures = measures_of(made, records)
    runs = [_run(run, outcomes, measures, records[run.name]) for run in made.runs]
    _add_findings(made, outcomes, runs)
    # Without policies that were not sampled because their run failed: the run itself is listed.
    follows = [
        step
        for step, policy in policies_of(made).items()
        if policy.name in outcomes and outcomes[policy.name].state == "failed"
    ]
    return {
        "study": study.name,
        "title": study.keys.title or study.name,
        "about": study.keys.about.strip(),
        "version": source_version(),
        "trained_by": _trained_by(made, outcomes),
        "seeds": study.keys.seeds,
        "baseline": study.keys.baseline,
        "arms": {name: _arm(made, name) for name in study.arms},
        "settings": differing_settings(made),
        "measures": {
            name: {"metrics": sorted(coefficients(one)), "of": one.of, "better": one.better}
            for name, one in measures.items()
        },
        "runs": runs,
        "summaries": _summaries(made, runs),
        "relations": _relations(made, runs),
        "wins": _wins(made, outcomes),
        "failed": {name: one.reason for name, one in outcomes.items() if one.state == "failed" and name not in follows},
    }


def _trained_by(made: Plan, outcomes: Mapping[str, Outcome]) -> list[str]:
    """List the versions that trained finished runs, in order."""
    finished = [run for run in made.runs if outcomes[run.name].state == "finished"]
    return list(dict.fromkeys(one for run in finished for one in versions_of(run_dir(run.config))))


def measures_of(made: Plan, records: Mapping[str, Records]) -> Mapping[str, Measure]:
    """Return the measures of the study file, or the default ones whose metrics any run has logged.

    Losses of different objectives cannot be compared and are then not among the defaults.
    """
    if made.study.measures:
        return made.study.measures
    objectives = {made.runs_of(arm)[0].config.model.objective for arm in made.compared}
    incomparable = {"val/loss"} if len(objectives) > 1 else set()
    there = logged(records[run.name] for arm in made.compared for run in made.runs_of(arm))
    return {name: one for name, one in USUAL_MEASURES.items() if set(coefficients(one)) <= there - incomparable}


def measured_arms(results: Mapping[str, Any]) -> dict[str, Any]:
    """Map name -> arm for the arms with results: all that are trained with every seed, unless they only start others.

    Args:
        results: contents of ``results.json``, with NaN for missing values.
    """
    starts = {arm["start"] for arm in results["arms"].values()}
    has_results = {
        name
        for name in results["arms"]
        if any(of[name]["mean"]["n"] for of in results["summaries"].values() if name in of)
        or any(name in of_arms for of_arms in results["wins"].values())
        or any(run["arm"] == name and run["state"] == "failed" for run in results["runs"])
    }
    return {
        name: arm
        for name, arm in results["arms"].items()
        if not arm["once"] and (name in has_results or name not in starts)
    }


def versions_text(results: Mapping[str, Any]) -> str:
    """Return the version that made the results, and those that trained the runs if they are others."""
    version: str = results["version"]
    trained = results.get("trained_by", [])  # absent from results that were kept before it was recorded
    if set(trained) <= {version}:
        return version
    commits = ", ".join(one.removeprefix(f"{version.partition(',')[0]}, ") for one in trained)
    return f"{version} (runs: {commits})"


# ---------------------------------------------------------------------------------------------------------------- runs


def _run(
    run: StudyRun, outcomes: Mapping[str, Outcome], measures: Mapping[str, Measure], records: Records
) -> dict[str, Any]:
    outcome = outcomes[run.name]
    finished = outcome.state == "finished"
    data = read_data_record(run_dir(run.config)) if finished else {}
    return {
        "name": run.name,
        "arm": run.arm,
        "seed": run.seed,
        "state": outcome.state,
        "reason": outcome.reason,
        "steps": read_run(run_dir(run.config)).get("finished_at") if finished else None,
        "prompts": data.get("training", {}).get("num_prompts"),
        "held_out_prompts": data.get("validation", {}).get("num_prompts"),
        "measures": {name: value_of(one, records) if finished else math.nan for name, one in measures.items()},
        "command": ["nemo-rao", "train", "--config-name", run.recipe, *run.overrides],
    }


def _add_findings(made: Plan, outcomes: Mapping[str, Outcome], runs: Sequence[dict[str, Any]]) -> None:
    """Add the results of a run's policy to its measures: tasks of lm-evaluation-harness, the log-ratio."""
    of_run, samples = {run["name"]: run for run in runs}, made.study.samples
    for step, policy in policies_of(made).items():
        if outcomes[step].state == "failed" or policy.name not in of_run:
            continue
        measures = of_run[policy.name]["measures"]
        if samples is not None and samples.log_ratio:
            measures["log-ratio of samples (KL), nats"] = log_ratio(made.folder, policy)
        if made.study.tasks is not None:
            measures |= task_metrics(made.folder, policy)


def _arm(made: Plan, name: str) -> dict[str, Any]:
    arm = made.study.arms[name]
    return {"label": label_of(name, arm), "recipe": arm.recipe, "start": arm.start, "once": arm.once}


def differing_settings(made: Plan) -> dict[str, dict[str, str]]:
    """Map arm -> key -> value for keys that differ between the compared arms, without keys an arm does not read.

    Paths in the study's directory are relative to it.
    """
    of_arms = {name: _settings(made.runs_of(name)[0].config) for name in made.compared}
    inside = f"{made.folder}/"
    of_arms = {
        name: {key: value.removeprefix(inside) for key, value in settings.items()} for name, settings in of_arms.items()
    }
    keys = dict.fromkeys(key for settings in of_arms.values() for key in settings)
    differing = [key for key in keys if len({settings.get(key) for settings in of_arms.values()}) > 1]
    return {name: {key: of[key] for key in differing if key in of} for name, of in of_arms.items()}


def _settings(config: RunConfig) -> dict[str, str]:
    unread = tuple(f"model.{name}." for name in registry.OBJECTIVES if name != config.model.objective)
    return {
        key: shown(value)
        for key, value in flat_keys(dataclasses.asdict(config)).items()
        if not key.startswith((*_OF_THE_RUN, *unread))
    }


# ----------------------------------------------------------------------------------------------------------- summaries


def _summaries(made: Plan, runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Map measure -> arm -> mean over seeds, and paired difference from the baseline."""
    names = list(dict.fromkeys(name for run in runs for name in run["measures"]))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        values = {
            arm: {run["seed"]: run["measures"].get(name, math.nan) for run in runs if run["arm"] == arm}
            for arm in made.compared
        }
        found[name] = {arm: {"mean": _estimate(mean(list(of.values())))} for arm, of in values.items()}
        if (baseline := made.study.keys.baseline) is not None:
            for arm, of in values.items():
                if arm != baseline:
                    found[name][arm]["difference"] = _estimate(paired_difference(of, values[baseline]))
    return found


def _relations(made: Plan, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Regress measures over keys, with one point per run."""
    found = {}
    configs = {run.name: run.config for run in made.runs}
    for name, relation in made.study.relations.items():
        points, num_runs = [], 0
        for run in runs:
            if run["arm"] not in (relation.arms or made.compared):
                continue
            num_runs += 1
            x = key_value(configs[run["name"]], relation.over, f"relations.{name}.over")
            y = run["measures"][relation.measure]
            if isinstance(x, float) and not math.isnan(y):
                points.append({"run": run["name"], "arm": run["arm"], "x": x, "y": y})
        found[name] = {
            **dataclasses.asdict(relation),
            "points": points,
            "num_runs": num_runs,
            "slope": _estimate(slope([point["x"] for point in points], [point["y"] for point in points])),
        }
    return found


def _wins(made: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Map opponent -> arm -> each seed's wins, and their mean; a policy is not compared with itself."""
    samples = made.study.samples
    if samples is None:
        return {}
    judged: dict[str, Judged] = {}

    def of(policy: Policy) -> Judged | None:
        if outcomes[f"policy {policy.name}"].state == "failed":
            return None
        if policy.name not in judged:
            judged[policy.name] = read_judged(made.folder, policy)
        return judged[policy.name]

    found: dict[str, dict[str, Any]] = {}
    for against in samples.against:
        other_arm = made.study.keys.baseline if against == "baseline" else against
        title = "start" if against == "start" else str(other_arm)
        found[title] = {}
        for arm in made.compared:
            if arm == other_arm:
                continue
            of_seeds = []
            for run in made.runs_of(arm):
                other_run = None if against == "start" else made.run_of(str(other_arm), run.seed)
                other = start_policy(made, run) if other_run is None else _policy(other_run)
                one, two = of(_policy(run)), of(other)
                if one is not None and two is not None:
                    result = compare(one, two)
                    of_seeds.append({"seed": run.seed, **dataclasses.asdict(result)})
            found[title][arm] = over_seeds(of_seeds)
    return found


def _policy(run: StudyRun) -> Policy:
    return Policy(run.name, run_dir(run.config))


def over_seeds(of_seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average win rates over seeds; the interval of a single seed is over prompts.

    Args:
        of_seeds: :class:`nemo_rao.study.statistics.Wins` as mappings, each with its ``seed``.
    """
    if not of_seeds:
        return {"seeds": []}
    rate = mean([one["rate"] for one in of_seeds])
    if rate.n == 1:
        of_prompts = next(one["interval"] for one in of_seeds if not math.isnan(one["rate"]))
        rate = Estimate(rate.value, of_prompts["half_width"], 1)
    shares = {name: mean([one[name] for one in of_seeds]).value for name in ("win", "tie", "loss")}
    controlled = mean([one["length_controlled"] for one in of_seeds])
    prompts = min(one["num_prompts"] for one in of_seeds)
    return {
        **shares,
        "rate": _estimate(rate),
        "length_controlled": _estimate(controlled),
        "num_prompts": prompts,
        "seeds": list(of_seeds),
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(found)
