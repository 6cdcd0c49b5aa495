"""The report of a study: results as blocks of a document, in words, tables and figures."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rao.config.derived import run_dir
from nemo_rao.runtime.files import write_atomically
from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.study.document import Block, Code, Document, Figure, Heading, Table, Text, html, write_markdown
from nemo_rao.study.figures import Bar, Panel, curves, intervals, regression
from nemo_rao.study.formatting import percent, shown, with_interval
from nemo_rao.study.measures import USUAL_CURVES, logged, series
from nemo_rao.study.planned import Plan
from nemo_rao.study.results import measured_arms, versions_text
from nemo_rao.study.statistics import Estimate

RESULTS, MARKDOWN, PAGE = "results.json", "report.md", "report.html"


def write_report(made: Plan, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``report.md`` and ``report.html`` into the study's directory."""
    write_atomically(made.folder / RESULTS, json.dumps(_plain(results), indent=1) + "\n")
    document = study_document(made, results)
    write_markdown(document, made.folder / MARKDOWN)
    write_atomically(made.folder / PAGE, html(document))


def study_document(made: Plan, results: Mapping[str, Any]) -> Document:
    """Build the report: question, failures, results, win rates, relations, curves, settings, runs."""
    return Document(str(results["title"]), list(_blocks(made, results)))


def _blocks(made: Plan, results: Mapping[str, Any]) -> Iterator[Block]:
    if results["about"]:
        yield Text(results["about"])
    yield Text(_setup(results))
    yield from _failures(results)
    yield from _results(results)
    yield from _wins(results)
    yield from _relations(results)
    yield from _curves(made, results)
    yield from _settings(results)
    yield from _runs(results)
    yield from _commands(made, results)


def _setup(results: Mapping[str, Any]) -> str:
    compared = measured_arms(results)
    seeds = ", ".join(map(str, results["seeds"]))
    words = [f"{len(compared)} arms × {len(results['seeds'])} seeds ({seeds}), by {versions_text(results)}."]
    words.append("Intervals are two-sided 95 % intervals by Student's t over seeds.")
    if results["baseline"] is not None:
        label = results["arms"][results["baseline"]]["label"]
        words.append(f"Differences are paired: run by run with the same seed, against {label}.")
    if len(results["seeds"]) < 2:
        words.append("With one seed there is no interval: differences may be chance.")
    return " ".join(words)


def _failures(results: Mapping[str, Any]) -> Iterator[Block]:
    if not results["failed"]:
        return
    yield Text(f"{len(results['failed'])} steps failed. Means are over the other seeds.", is_warning=True)
    yield Table(["failed", "reason"], [[name, reason] for name, reason in results["failed"].items()], num_labels=2)


def _results(results: Mapping[str, Any]) -> Iterator[Block]:
    summaries, baseline = results["summaries"], results["baseline"]
    if not summaries:
        return
    yield Heading("Results")
    compared = measured_arms(results)
    finished = {
        name: sum(run["arm"] == name and run["state"] == "finished" for run in results["runs"]) for name in compared
    }
    rows = [
        [arm["label"], *(_of_seeds(of[name]["mean"], finished[name]) for of in summaries.values()), str(finished[name])]
        for name, arm in compared.items()
    ]
    yield from _absent_measures(results)
    yield Table(["arm", *(f"{name}{_arrow(results, name)}" for name in summaries), "seeds"], rows)
    if baseline is not None and len(compared) > 1:
        rows = []
        for name, arm in compared.items():
            if name != baseline:
                differences = [of[name]["difference"] for of in summaries.values()]
                pairs = max(one["n"] for one in differences)
                rows.append([arm["label"], *(_difference(one, pairs) for one in differences), str(pairs)])
        yield Heading(f"Difference from {results['arms'][baseline]['label']}, paired by seed", 3)
        yield Table(["arm", *summaries, "pairs"], rows)
        if any("*" in cell for row in rows for cell in row):
            yield Text("* The interval does not contain 0. No correction is made for the number of comparisons.")
        if any(cell.partition(" (")[0].endswith("± 0") for row in rows for cell in row):
            yield Text("± 0: equal in all seeds, without a spread to judge the difference by; never marked with *.")
    groups = {}
    for measure, of in summaries.items():
        groups[measure] = [
            Bar(
                arm["label"],
                _estimate(of[name]["mean"]),
                [_value(run, measure) for run in results["runs"] if run["arm"] == name],
            )
            for name, arm in compared.items()
        ]
    yield Figure("measures", intervals(groups, "measures"), "Means with 95 % intervals; a gray dot is a seed.")


def _arrow(results: Mapping[str, Any], name: str) -> str:
    better = results["measures"].get(name, {}).get("better")
    return {"higher": " ↑", "lower": " ↓"}.get(better, "")


def _absent_measures(results: Mapping[str, Any]) -> Iterator[Block]:
    """Name measures without any value, which have empty columns."""
    compared = [run for run in results["runs"] if not results["arms"][run["arm"]]["once"]]
    if all(run["state"] == "failed" for run in compared):
        return
    for name, measure in results["measures"].items():
        if not any(one["mean"]["n"] for one in results["summaries"][name].values()):
            needed = ", ".join(measure["metrics"]) + (" at two steps" if measure["of"] == "change" else "")
            yield Text(
                f"{name}: no finished run has logged {needed}; see metrics.jsonl for its metrics.", is_warning=True
            )


def _of_seeds(found: Mapping[str, Any], expected: int) -> str:
    """Format an estimate; if it has fewer than ``expected`` seeds, with their number."""
    missing = f" ({found['n']} of {expected})" if 0 < found["n"] < expected else ""
    return f"{with_interval(found)}{missing}"


def _difference(found: Mapping[str, Any], pairs: int) -> str:
    is_clear = 0 < found["half_width"] < abs(found["value"])  # false for NaN
    return f"{_of_seeds(found, pairs)}{' *' if is_clear else ''}"


def _value(run: Mapping[str, Any], measure: str) -> float:
    return float(run["measures"].get(measure, math.nan))


def _wins(results: Mapping[str, Any]) -> Iterator[Block]:
    if not results["wins"]:
        return
    yield Heading("Win rates")
    yield Text(
        "Every sample of a prompt is compared with every one of the other policy's samples of it, by the scorer's "
        "scores. A tie counts one half. Length-controlled: the rate that a logistic regression predicts for answers of "
        "equal length (AlpacaEval 2, without its term for an instruction's difficulty). If only one seed is compared, "
        "the interval is over prompts."
    )
    for against, of_arms in results["wins"].items():
        label = results["arms"].get(against, {}).get("label", "its start" if against == "start" else against)
        yield Heading(f"Against {label}", 3)
        rows, bars = [], []
        for name, found in of_arms.items():
            arm = results["arms"][name]["label"]
            if not found["seeds"]:
                rows.append([arm, "failed", *[""] * 6])
                continue
            if found["rate"]["n"] == 0:
                rows.append([arm, "no prompt has scores of both", *[""] * 6])
                continue
            shares = [f"{100 * found[share]:.1f}" for share in ("win", "tie", "loss")]
            rates = [percent(found["rate"]), percent(found["length_controlled"])]
            rows.append([arm, *rates, *shares, f"{found['num_prompts']:,}", str(found["rate"]["n"])])
            rate = _estimate(found["rate"])
            points = [100 * one["rate"] for one in found["seeds"]]
            bars.append(Bar(arm, Estimate(100 * rate.value, 100 * rate.half_width, rate.n), points))
        header = ["arm", "win rate, %", "length-controlled, %", "wins, %", "ties, %", "losses, %", "prompts", "seeds"]
        yield Table(header, rows)
        if bars:
            name = f"wins-{against}"
            svg = intervals({f"win rate against {label}, %": bars}, name, mark=50)
            yield Figure(name, svg, f"Win rate against {label}, ties by half, with 95 % intervals; 50 % is a draw.")


def _relations(results: Mapping[str, Any]) -> Iterator[Block]:
    if not results["relations"]:
        return
    yield Heading("Relations")
    rows, figures = [], []
    for number, (name, found) in enumerate(results["relations"].items(), start=1):
        expected = found["expected"]
        inside = ""
        if expected is not None and not math.isnan(found["slope"]["half_width"]):
            inside = "yes" if abs(found["slope"]["value"] - expected) <= found["slope"]["half_width"] else "no"
        slope = with_interval(found["slope"])
        used = len(found["points"])
        runs = str(used) if used == found["num_runs"] else f"{used} of {found['num_runs']}"
        rows.append([name, found["measure"], found["over"], slope, shown(expected), inside, runs])
        if len(found["points"]) > 1:
            points: dict[str, list[tuple[float, float]]] = {}
            for point in found["points"]:
                points.setdefault(results["arms"][point["arm"]]["label"], []).append((point["x"], point["y"]))
            svg = regression(
                points,
                slope=found["slope"]["value"],
                expected=expected,
                over=found["over"],
                measure=found["measure"],
                name=f"relation-{number}",
            )
            figures.append(Figure(f"relation-{number}", svg, f"{name}: {found['measure']} over {found['over']}."))
    header = ["relation", "measure", "over", "slope", "expected", "expected is inside", "runs"]
    yield Table(header, rows, num_labels=3)
    if any(len(found["points"]) < found["num_runs"] for found in results["relations"].values()):
        yield Text(
            "Runs are excluded if they failed, did not log the measure, or have a key that is not a number (auto)."
        )
    yield from figures


def _curves(made: Plan, results: Mapping[str, Any]) -> Iterator[Block]:
    records = {
        run.name: read_metrics(run_dir(run.config) / "metrics.jsonl")
        for arm in made.compared
        for run in made.runs_of(arm)
    }
    there = logged(records.values())
    wanted = {name: _titled(name) for name in made.study.keys.curves} or {
        f"val/{name}" if f"val/{name}" in there else name: title for name, title in USUAL_CURVES.items()
    }
    panels = {}
    for metric, (title, unit) in wanted.items():
        lines = {
            results["arms"][arm]["label"]: [
                found for run in made.runs_of(arm) if (found := series(records[run.name], metric))[0]
            ]
            for arm in made.compared
        }
        lines = {label: of_seeds for label, of_seeds in lines.items() if of_seeds}
        if lines:
            panels[metric] = Panel(title, unit, lines)
    absent = [name for name in made.study.keys.curves if name not in panels]
    if panels or absent:
        yield Heading("Curves")
    if absent:
        yield Text(
            f"No compared run has logged {', '.join(absent)}; see metrics.jsonl for its metrics.", is_warning=True
        )
    if panels:
        yield Figure(
            "curves",
            curves(list(panels.values()), "curves"),
            "Means over seeds; a band spans the seeds, lowest to highest.",
        )


def _titled(metric: str) -> tuple[str, str]:
    """Return title and unit of a metric that the study names."""
    title, unit = USUAL_CURVES.get(metric) or USUAL_CURVES.get(metric.removeprefix("val/"), (metric, ""))
    is_held_out = metric.startswith("val/") and title != metric and not title.startswith("held-out")
    return f"held-out {title}" if is_held_out else title, unit


def _settings(results: Mapping[str, Any]) -> Iterator[Block]:
    settings = results["settings"]
    yield Heading("Settings")
    arms = {name: arm for name, arm in results["arms"].items() if not arm["once"]}
    keys = list(dict.fromkeys(key for of in settings.values() for key in of))
    rows = [["recipe", *(arm["recipe"] for arm in arms.values())]]
    rows.append(["start", *(arm["start"] or "recipe's" for arm in arms.values())])
    rows += [[key, *(settings[name].get(key, "–") for name in arms)] for key in keys]
    yield Table(["key", *(arm["label"] for arm in arms.values())], rows, num_labels=1 + len(arms))
    yield Text("Only keys that differ between arms; – where an arm's objective does not read the key.")


def _runs(results: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("Runs")
    header = ["run", "state", "seed", "steps", "prompts", "held-out prompts"]
    rows = [
        [
            run["name"],
            run["state"],
            str(run["seed"]),
            *("" if run[name] is None else f"{run[name]:,}" for name in ("steps", "prompts", "held_out_prompts")),
        ]
        for run in results["runs"]
    ]
    yield Table(header, rows, num_labels=2)


def _commands(made: Plan, results: Mapping[str, Any]) -> Iterator[Block]:
    yield Heading("Commands")
    yield Code(
        shlex.join(["nemo-rao", "study", str(made.study.path), "--out", str(made.folder), *made.study.overrides])
    )
    yield Text("The runs, one by one:")
    yield Code(
        "\n".join(shlex.join(run["command"]) for run in results["runs"]), folded=f"{len(results['runs'])} commands"
    )


def _estimate(found: Mapping[str, Any]) -> Estimate:
    return Estimate(found["value"], found["half_width"], found["n"])


def _plain(value: Any) -> Any:
    """Convert to JSON values, with null instead of NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
