"""docs/papers.md: claims are judged by intervals, refer to what the shipped studies have, and match the results."""

import functools
import json
import math
from pathlib import Path

import pytest

from benchmarks import papers
from benchmarks.papers import CLAIMS, HELD, NOT_HELD, UNDECIDED, Finding, chosen, keep, page, read_studies
from nemo_rao.config.compose import package_recipes
from nemo_rao.config.derived import objective_config
from nemo_rao.study.plan import plan
from nemo_rao.study.planned import Plan
from nemo_rao.study.statistics import Estimate, mean
from nemo_rao.study.study_file import load_study

NAN = float("nan")
SHIPPED = [path.stem for path in sorted((package_recipes() / "study").glob("*.yaml"))]


@functools.cache
def planned(name: str) -> Plan:
    return plan(load_study(name), "nowhere")


@pytest.mark.parametrize(
    ("value", "half_width", "side", "than", "margin", "verdict"),
    [
        (-2.0, 0.5, "below", 0, 0, HELD),
        (2.0, 0.5, "below", 0, 0, NOT_HELD),
        (-2.0, 2.5, "below", 0, 0, UNDECIDED),
        (60.0, 5.0, "above", 50, 0, HELD),
        (40.0, 5.0, "above", 50, 0, NOT_HELD),
        (54.0, 5.0, "above", 50, 0, UNDECIDED),
        (0.0, 0.0, "above", 0, 0, HELD),
        (-0.3, 0.2, "above", 0, 0, NOT_HELD),
        (-0.28, 0.02, "equal", -0.3, 0.05, HELD),
        (-0.28, 0.05, "equal", -0.3, 0.05, UNDECIDED),
        (-0.1, 9.0, "equal", -0.3, 0.05, UNDECIDED),
        (-0.2, 0.04, "equal", -0.3, 0.05, NOT_HELD),
        (1.0, NAN, "above", 0, 0, UNDECIDED),
        (NAN, NAN, "below", 0, 0, UNDECIDED),
    ],
)
def test_a_claim_holds_if_the_interval_is_on_its_side(value, half_width, side, than, margin, verdict):
    assert Finding("x", Estimate(value, half_width, 5), side, than, margin).verdict == verdict


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_refers_to_measures_relations_and_arms_of_its_study(claim):
    """Judged on results whose values are made up, of the arms that the study plans."""
    made = planned(claim.study + "_toy")
    study = made.study
    values = {arm: [0.1 * number, 0.2 * number, 0.25 * number] for number, arm in enumerate(made.compared, start=1)}
    results = {
        "runs": [
            {"arm": arm, "seed": seed, "measures": dict.fromkeys(study.measures, value)}
            for arm, of in values.items()
            for seed, value in enumerate(of)
        ],
        "summaries": {name: {arm: {"mean": vars(mean(of))} for arm, of in values.items()} for name in study.measures},
        "relations": {
            name: {"slope": vars(mean([1.0, 2.0])), "expected": one.expected} for name, one in study.relations.items()
        },
        "wins": {
            study.keys.baseline if against == "baseline" else against: {
                arm: {"rate": vars(mean(of)), "seeds": [{"seed": n, "rate": rate} for n, rate in enumerate(of)]}
                for arm, of in values.items()
                if arm != against
            }
            for against in (study.samples.against if study.samples else ())
        },
    }
    findings = claim.findings(results)
    assert findings and all(not math.isnan(one.estimate.value) for one in findings)


def test_reward_models_are_compared_with_the_next_better_one():
    """Win rates over the ground truth, of which a seed of the noisy one is missing."""
    seeds = {"learned_few": {1: 0.2, 2: 0.3}, "learned_noisy": {1: 0.5}, "learned_many": {1: 0.4, 2: 0.45}}
    wins = {
        arm: {"rate": vars(mean([*of.values()])), "seeds": [{"seed": n, "rate": rate} for n, rate in of.items()]}
        for arm, of in seeds.items()
    }
    [claim] = [one for one in CLAIMS if "better the reward model" in one.text]
    few, noisy, every = claim.findings({"wins": {"bwd": wins}})
    assert few.estimate.value == pytest.approx(-17.5) and few.estimate.n == 2
    assert noisy.estimate.value == pytest.approx(10) and noisy.estimate.n == 1
    assert every.estimate.value == pytest.approx(42.5) and every.than == 50


def test_the_page_is_that_of_the_results():
    assert (Path(__file__).parents[2] / "docs/papers.md").read_text() == page()


def test_kept_results_are_of_shipped_studies():
    assert read_studies().keys() <= {*SHIPPED}


CHOSEN = {name: best for name in SHIPPED if (best := chosen(name, read_studies()))}


def test_settings_of_some_studies_were_chosen():
    assert CHOSEN.keys() >= {"rao_table1_toy", "rao_table2_toy", "rpo_ground_truth_toy"}


@pytest.mark.parametrize("name", CHOSEN)
def test_studies_use_the_settings_that_were_best_on_other_prompts(name):
    def settings(study, arm):
        config = planned(study).runs_of(arm)[0].config
        return config.model.optim.lr, objective_config(config)

    best = CHOSEN[name]
    assert len(best) >= 5
    assert {arm: settings(name, arm) for arm in best} == {arm: settings(*of) for arm, of in best.items()}


def test_settings_are_chosen_by_win_rate_or_else_by_loss():
    arms = {"sft": {"once": True}, **{name: {"once": False} for name in ("a_1e-4", "a_3e-4", "b_c_1e-4", "b_c_3e-4")}}
    of = {"title": "T.", "about": "A.", "seeds": [6], "version": "v", "arms": arms}
    values = dict(zip(list(arms)[1:], (0.6, 0.7, 0.8, NAN), strict=True))
    means = {arm: {"value": value, "half_width": NAN, "n": 1} for arm, value in values.items()}
    by_loss = {**of, "wins": {}, "summaries": {"loss": {arm: {"mean": one} for arm, one in means.items()}}}
    by_wins = {**of, "wins": {"start": {arm: {"rate": one} for arm, one in means.items()}}, "summaries": {}}
    higher = {"value": 0.65, "half_width": NAN, "n": 1}
    beside = {**of, "arms": {"a_2e0": {"once": False}}, "wins": {"start": {"a_2e0": {"rate": higher}}}, "summaries": {}}
    assert chosen("x_toy", {}) == {}
    assert chosen("x_toy", {"x_rates_toy": by_loss})["a"] == ("x_rates_toy", "a_1e-4")
    studies = {"x_rates_toy": by_wins, "x_strengths_toy": beside}
    assert chosen("x_toy", studies) == {"a": ("x_rates_toy", "a_3e-4"), "b_c": ("x_rates_toy", "b_c_1e-4")}
    higher["value"] = 0.75
    assert chosen("x_toy", studies)["a"] == ("x_strengths_toy", "a_2e0")
    made = page(studies)
    assert "| `a` | 0.0001: 60.00, 0.0003: 70.00 |" in made and "| `a` | **2: 75.00** |" in made
    assert "| `b_c` | **0.0001: 80.00** |" in made


def test_results_are_kept_with_their_figures_and_without_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "STUDIES", tmp_path / "kept")
    monkeypatch.setattr(papers, "FIGURES", tmp_path / "figures")
    study = tmp_path / "study"
    (study / "figures").mkdir(parents=True)
    (study / "figures" / "wins-start.svg").write_text("<svg></svg>")
    results = {
        "study": "rao_likelihood_toy",
        "title": "Title?",
        "about": "About.",
        "version": "nemo-rao 1, commit a",
        "seeds": [1, 2],
        "arms": {
            "dpo": {"label": "DPO", "start": "sft", "once": False},
            "rao": {"label": "RAO", "start": "sft", "once": False},
        },
        "summaries": {
            "chosen, change in nats": {
                "dpo": {"mean": {"value": -2.0, "half_width": 0.25, "n": 2}},
                "rao": {"mean": {"value": None, "half_width": None, "n": 0}},
            }
        },
        "runs": [{"arm": "dpo", "seed": 1, "state": "finished", "measures": {}, "command": ["nemo-rao"]}],
        "relations": {},
        "wins": {
            "start": {
                "dpo": {
                    "rate": {"value": 0.6, "half_width": 0.1, "n": 2},
                    "seeds": [{"seed": 1, "rate": 0.6, "win": 0.5}],
                }
            }
        },
        "failed": {"rao-seed1": "loss was not finite"},
    }
    (study / "results.json").write_text(json.dumps(results))
    kept = json.loads(keep(study).read_text())
    assert "command" not in kept["runs"][0]
    assert kept["wins"]["start"]["dpo"]["seeds"] == [{"seed": 1, "rate": 0.6}]
    made = page(read_studies())
    assert "| RAO | Under DPO the log-probability of chosen responses falls. |" in made
    assert "chosen, from start to end, nats: -2.00 ± 0.25 | **held** |" in made
    assert "chosen, from start to end, nats:  | **undecided** |" in made
    assert "| DPO | -2.00 ± 0.25 | 60 ± 10 |" in made and "1 steps failed." in made
    assert "The 95 % interval of a win rate is ± 10.0 points (median)." in made
    assert "images/studies/rao_likelihood_toy-wins-start.svg" in made
    assert made.count("not run") == len(CLAIMS) - 2, "of studies that were not kept"
    with pytest.raises(SystemExit, match="no such file; run the study first"):
        keep(tmp_path / "absent")
