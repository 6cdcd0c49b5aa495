"""Results and report of a study whose runs are made by hand: what is computed over seeds, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from nemo_rao.checkpoint.run_records import NOT_RECORDED, versions_of, write_run
from nemo_rao.config.derived import run_dir
from nemo_rao.runtime.source_version import source_version
from nemo_rao.study.document import Code, Document, Figure, Heading, Table, Text, html, markdown
from nemo_rao.study.figures import Panel, curves, legend_columns
from nemo_rao.study.formatting import shown, with_interval
from nemo_rao.study.plan import plan
from nemo_rao.study.planned import Plan
from nemo_rao.study.policies import Policy
from nemo_rao.study.policy_results import task_metrics
from nemo_rao.study.report import write_report
from nemo_rao.study.results import collect, measured_arms, over_seeds, versions_text
from nemo_rao.study.run import Outcome
from nemo_rao.study.statistics import wins
from nemo_rao.study.study_file import load_study

STUDY = """
title: Made by hand
seeds: [1, 2, 3]
baseline: low
common: {model: demo_llama, data.train_path: train.jsonl, data.tokenizer: tokenizer}
arms:
  low: {recipe: gpt_rao, set: {model.rao.log_z0: 0}}
  high: {recipe: gpt_rao, set: {model.rao.log_z0: 10}}
  lost: {recipe: gpt_rao, label: "lost $^$", set: {model.rao.log_z0: auto}}
measures:
  mean: {metric: {val/rewards/chosen: 0.5, val/rewards/rejected: 0.5}}
  chosen: {metric: val/logps/chosen, of: change}
  not in seed 1: val/sometimes
  logged once: {metric: val/once, of: change}
curves: [val/logps/chosen, val/lgps/chosen]
relations:
  shift: {measure: mean, over: model.rao.log_z0, expected: -0.1}
"""
# The mean of the implicit rewards: seeds differ by much more than arms, whose differences are 1.0, 0.9 and 1.1.
MEANS = {"low": {1: 0.0, 2: 10.0, 3: 20.0}, "high": {1: -1.0, 2: 9.1, 3: 18.9}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("study")
    (folder / "by_hand.yaml").write_text(STUDY)
    planned = plan(load_study(str(folder / "by_hand.yaml")), str(folder / "out"))
    for run in planned.runs:
        if run.arm in MEANS:
            sometimes = {} if run.seed == 1 else {"val/sometimes": {"low": 5.0, "high": 7.0}[run.arm]}
            write_metrics(run_dir(run.config), MEANS[run.arm][run.seed], {"val/once": 1.0, **sometimes})
    return planned


def write_metrics(folder: Path, mean: float, last: dict[str, float]) -> None:
    """Held-out rewards ``mean`` ± 1 at the last step, chosen log-probabilities that fall from -20 to -22."""
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "val/rewards/chosen": 0.0, "val/rewards/rejected": 0.0, "val/logps/chosen": -20.0},
        {"step": 5, "loss": 0.3, "logps/chosen": -21.0},
        {"step": 5, "val/rewards/chosen": mean + 1, "val/rewards/rejected": mean - 1, "val/logps/chosen": -22.0} | last,
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(folder, start_from=None, max_steps=5, finished_at=5, engine="nemo")


def outcomes(made: Plan) -> dict[str, Outcome]:
    lost = Outcome("failed", "loss was not finite at step 3")
    return {step.name: lost if step.name.startswith("lost") else Outcome("finished") for step in made.steps}


def test_differences_are_paired_by_seed_and_means_are_over_seeds(made: Plan) -> None:
    found = collect(made, outcomes(made))
    of_mean = found["summaries"]["mean"]
    assert of_mean["low"]["mean"]["value"] == pytest.approx(10)
    assert of_mean["low"]["mean"]["half_width"] == pytest.approx(4.302653 * 10 / 3**0.5, rel=1e-5)
    difference = of_mean["high"]["difference"]
    assert (difference["value"], difference["n"]) == (pytest.approx(-1), 3)
    assert difference["half_width"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
    assert "difference" not in of_mean["low"]
    assert found["summaries"]["chosen"]["high"]["mean"]["value"] == -2
    assert of_mean["lost"]["mean"]["n"] == 0
    assert found["relations"]["shift"]["slope"]["value"] == pytest.approx(-0.1), "arms with `auto` have no number"
    assert found["relations"]["shift"]["slope"]["n"] == 6


def test_reports_name_the_versions_that_trained_the_runs(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect(made, outcomes(made))
    assert found["trained_by"] == [found["version"]] == [source_version()]
    assert versions_text(found) == source_version(), "once, if it is the same"
    monkeypatch.setattr("nemo_rao.study.results.source_version", lambda: "nemo-rao 9.9, commit 4567")
    later = collect(made, outcomes(made))
    assert (later["version"], later["trained_by"]) == ("nemo-rao 9.9, commit 4567", [source_version()])
    folder = run_dir(made.run_of("low", 1).config)
    write_run(folder, start_from=None, max_steps=5, finished_at=5, engine="nemo")
    assert versions_of(folder) == [source_version()], "trained anew"
    write_run(folder, start_from=None, max_steps=5, finished_at=5, engine="nemo", continues=True)
    assert versions_of(folder) == [source_version()], "once"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "versions"}))
    write_run(folder, start_from=None, max_steps=5, finished_at=5, engine="nemo", continues=True)
    assert collect(made, outcomes(made))["trained_by"] == [NOT_RECORDED, source_version()]
    write_run(folder, start_from=None, max_steps=5, finished_at=5, engine="nemo")
    later["trained_by"] = ["nemo-rao 9.9, commit 0123", "nemo-rao 0.1.0"]
    assert versions_text(later) == "nemo-rao 9.9, commit 4567 (runs: commit 0123, nemo-rao 0.1.0)"


def test_a_single_seed_among_failed_ones_has_the_interval_over_its_prompts() -> None:
    """The first of two seeds has no prompt with scores of both policies."""
    of_prompts = wins([[1.0], [1.0], [0.0]], [[0.0], [0.0], [1.0]], [[1.0]] * 3, [[1.0]] * 3)
    without = wins([], [], [], [])
    found = over_seeds([{"seed": n, **dataclasses.asdict(one)} for n, one in enumerate([without, of_prompts])])
    assert (found["rate"]["value"], found["rate"]["n"]) == (pytest.approx(2 / 3), 1)
    assert found["rate"]["half_width"] == pytest.approx(4.302653 / 3, rel=1e-5)


def test_metrics_of_tasks_keep_every_filter(tmp_path: Path) -> None:
    (tmp_path / "tasks/rao-seed1").mkdir(parents=True)
    metrics = {
        "exact_match,strict-match": 0.2,
        "exact_match,flexible-extract": 0.3,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "alias": "gsm8k",
    }
    (tmp_path / "tasks/rao-seed1/results.json").write_text(json.dumps({"tasks": {"gsm8k": {"metrics": metrics}}}))
    assert task_metrics(tmp_path, Policy("rao-seed1", tmp_path)) == {
        "gsm8k exact_match (strict-match)": 0.2,
        "gsm8k exact_match (flexible-extract)": 0.3,
        "gsm8k acc": 0.5,
    }


def test_settings_are_those_that_differ(made: Plan) -> None:
    settings = collect(made, outcomes(made))["settings"]
    assert settings == {arm: {"model.rao.log_z0": z} for arm, z in (("low", "0.0"), ("high", "10.0"), ("lost", "auto"))}


def test_starts_without_a_measure_are_no_rows_of_the_results(made: Plan) -> None:
    """An arm that another starts from, is trained with every seed and has logged no measure; failed arms stay."""
    results = collect(made, outcomes(made))
    assert list(measured_arms(results)) == ["low", "high", "lost"]
    arm = {"label": "base", "recipe": "gpt_sft", "start": None, "once": False}
    results["arms"] |= {"base": arm, "unused": arm, "once": arm | {"once": True}}
    results["arms"]["low"]["start"] = "base"
    assert list(measured_arms(results)) == ["low", "high", "lost", "unused"], "left out: base and once"
    results["summaries"]["mean"]["base"] = results["summaries"]["mean"]["low"]
    assert list(measured_arms(results)) == ["low", "high", "lost", "base", "unused"]


def height_in_points(svg: str) -> float:
    found = re.search(r'<svg [^>]*height="([\d.]+)pt"', svg)
    assert found is not None, svg[:200]
    return float(found[1])


def test_a_legend_has_as_many_columns_as_fit() -> None:
    """Ten labels of 40 characters below panels are all inside the picture."""
    labels = [f"{number}: a reward model with a long description" for number in range(10)]
    panel = Panel("loss", "nats", {label: [([0, 1], [1.0, 0.5])] for label in labels})
    assert legend_columns(labels) == 2
    assert legend_columns(["DPO", "RAO"]) == 2
    assert legend_columns([f"arm {number}" for number in range(9)]) == 6
    few = Panel("loss", "nats", {label: [([0, 1], [1.0, 0.5])] for label in labels[:2]})
    assert height_in_points(curves([panel], "x")) > height_in_points(curves([few], "x")) + 60, "room for five rows"


def test_the_report_shows_failures_and_is_the_same_each_time(made: Plan) -> None:
    write_report(made, collect(made, outcomes(made)))
    names = ("report.md", "report.html", "results.json")
    first = {name: (made.folder / name).read_text() for name in names}
    assert f", by {source_version()}. " in first["report.md"]
    assert "| lost-seed2 | loss was not finite at step 3 |" in first["report.md"]
    assert "| high | -1.00 ± 0.25 * | 0 ± 0 | 2.000 ± 0 (2 of 3) |  | 3 |" in first["report.md"], "equal: no star"
    assert "| low | 10 ± 25 | -2.000 ± 0 | 5.000 ± 0 (2 of 3) |  | 3 |" in first["report.md"]
    assert "**logged once: no finished run has logged val/once at two steps; " in first["report.md"]
    assert "**No compared run has logged val/lgps/chosen; " in first["report.md"]
    assert "| yes | 6 of 9 |" in first["report.md"], "runs without a number are counted"
    assert "NaN" not in first["results.json"]
    for name in ("measures", "relation-1", "curves"):
        assert (made.folder / "figures" / f"{name}.svg").read_text().startswith("<svg")
    write_report(made, collect(made, outcomes(made)))
    assert {name: (made.folder / name).read_text() for name in names} == first


@pytest.mark.parametrize(
    ("value", "half_width", "text"),
    [
        (0.71234, 0.01399, "0.712 ± 0.014"),
        (-20.4, 1.51, "-20.4 ± 1.5"),
        (12345.6, 250.0, "12,346 ± 250"),
        (0.5, float("nan"), "0.5000"),
        (2.0, 0.0, "2.000 ± 0"),
        (float("nan"), float("nan"), ""),
    ],
)
def test_numbers_are_rounded_by_their_interval(value: float, half_width: float, text: str) -> None:
    assert with_interval({"value": value, "half_width": half_width}) == text


def test_numbers_without_interval_have_four_digits() -> None:
    assert [shown(one) for one in (0.0, 123.456, 1e-7, -0.012341, None)] == ["0", "123.5", "1.000e-07", "-0.01234", ""]


def test_a_page_escapes_all_text_and_loads_nothing() -> None:
    evil = '<img src="http://x/">'
    blocks = [Heading(evil), Text(evil, is_warning=True), Table([evil], [[evil]]), Code(evil, folded=evil)]
    page = html(Document(evil, [*blocks, Figure("f", "<svg><style>*{}</style></svg>", evil)]))
    assert "<img" not in page and page.count("&lt;img") >= 8
    assert "<svg></svg>" in page and "default-src 'none'" in page
    assert "| a\\|b |" in markdown(Document("t", [Table(["x"], [["a|b"]])]))
    code = markdown(Document("t", [Code("a ```` b")]))
    assert code == "# t\n\n`````\na ```` b\n`````\n"
