"""docs/papers.md: the papers' claims, compared with the results of studies in benchmarks/results/studies.

    nemo-rao study rao_likelihood_toy
    python -m benchmarks.papers keep runs/study/rao_likelihood_toy     # its results and figures
    python -m benchmarks.papers > docs/papers.md                       # what `make papers-page` does

A claim holds if the 95 % confidence interval over seeds agrees with it, and does not hold if the interval contradicts
it. A claim that a number has a given value holds if the interval lies within a stated margin of the value. Nothing is
entered by hand; a test compares the page with the results.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.results import FOLDER
from nemo_rao.runtime.files import write_atomically
from nemo_rao.study.formatting import percent, shown, with_interval
from nemo_rao.study.results import measured_arms, versions_text
from nemo_rao.study.statistics import Estimate, paired_difference
from nemo_rao.study.study_file import load_study

STUDIES = FOLDER / "studies"
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "images" / "studies"
CHOOSING = ("_rates_toy", "_strengths_toy")  # ends of the names of studies that choose the settings of another
KL = "log-ratio of samples (KL), nats"
# Studies on data that cannot be distributed: arguments, and what the data was.
OWN_DATA = {
    "rao_likelihood_smollm2": (
        "files.rows.split=prefs.jsonl",
        "`prefs.jsonl` had questions of AlpacaEval with four models' answers each, judged by GPT-4.",
    ),
}
# What a study's curves show about its table, without figures.
REMARKS = {
    "rao_table1_toy": (
        "The curves show that most reward models from the fine-tuned model stay on a plateau of the loss, which those "
        "from the base model leave; a longer run or another learning rate may change the order."
    ),
}
Results = Mapping[str, Any]

HELD, NOT_HELD, UNDECIDED = "held", "did not hold", "undecided"
RAO, RPO = "RAO", "RPO (arXiv 2502.00203)"


@dataclass(frozen=True)
class Finding:
    """A claim's number: an estimate, and where the claim puts it.

    Attributes:
        what: description of the number, with its unit.
        side: "above" or "below" ``than``, or "equal" to it, by ``margin``.
    """

    what: str
    estimate: Estimate
    side: str
    than: float = 0.0
    margin: float = 0.0

    @property
    def verdict(self) -> str:
        """:data:`HELD`, :data:`NOT_HELD` or :data:`UNDECIDED`."""
        low, high = self.estimate.low, self.estimate.high
        if math.isnan(low):
            return UNDECIDED
        least, most = {
            "above": (self.than, math.inf),
            "below": (-math.inf, self.than),
            "equal": (self.than - self.margin, self.than + self.margin),
        }[self.side]
        if least <= low and high <= most:
            return HELD
        return NOT_HELD if high < least or low > most else UNDECIDED

    def __str__(self) -> str:
        expected = f" (claimed {self.than:g} ± {self.margin:g})" if self.side == "equal" else ""
        return f"{self.what}: {with_interval(vars(self.estimate))}{expected}"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, and the study and numbers that test it."""

    paper: str
    text: str
    study: str
    findings: Callable[[Results], Sequence[Finding]]


def _mean(results: Results, measure: str, arm: str) -> Estimate:
    return Estimate(**results["summaries"][measure][arm]["mean"])


def _difference(results: Results, measure: str, arm: str, other: str) -> Estimate:
    values: dict[str, dict[int, float]] = {arm: {}, other: {}}
    for run in results["runs"]:
        if run["arm"] in values:
            value = run["measures"].get(measure)
            values[run["arm"]][run["seed"]] = math.nan if value is None else value
    return paired_difference(values[arm], values[other])


def _rate(results: Results, arm: str, against: str) -> Estimate:
    """Win rate, in percent; NaN if no seed has one."""
    rate = results["wins"][against].get(arm, {}).get("rate", {"value": math.nan, "half_width": math.nan, "n": 0})
    return Estimate(100 * rate["value"], 100 * rate["half_width"], rate["n"])


def _rate_difference(results: Results, arm: str, other: str, against: str) -> Estimate:
    """Difference of the win rates of two arms over a third, in points, paired by seed."""
    rates = [
        {one["seed"]: 100 * one["rate"] for one in results["wins"][against].get(name, {}).get("seeds", ())}
        for name in (arm, other)
    ]
    return paired_difference(rates[0], rates[1])


def _likelihood(arm: str, side: str) -> Callable[[Results], Sequence[Finding]]:
    def findings(results: Results) -> Sequence[Finding]:
        return [
            Finding("chosen, from start to end, nats", _mean(results, "chosen, change in nats", arm), side),
        ]

    return findings


def _relation(name: str, what: str, side: str, margin: float = 0.0) -> Callable[[Results], Sequence[Finding]]:
    """The slope of a relation of the study, compared with the study's expected slope if ``side`` is "equal"."""

    def findings(results: Results) -> Sequence[Finding]:
        found = results["relations"][name]
        than = found["expected"] if side == "equal" else 0.0
        return [Finding(what, Estimate(**found["slope"]), side, than, margin)]

    return findings


def _relations(name: str, what: str, margin: float) -> Callable[[Results], Sequence[Finding]]:
    """The same above and below log_z0 = auto, the mean reward / beta."""

    def findings(results: Results) -> Sequence[Finding]:
        return [
            *_relation(f"{name}, above auto", f"{what}, above auto", "equal", margin)(results),
            *_relation(f"{name}, below auto", f"{what}, below auto", "equal", margin)(results),
        ]

    return findings


def _reward_models(better: str, worse: str) -> Callable[[Results], Sequence[Finding]]:
    def findings(results: Results) -> Sequence[Finding]:
        found = []
        for size in ("few", "all"):
            pair = f"{better}_{size}", f"{worse}_{size}"
            found.append(Finding(f"loss, difference, {size} pairs", _difference(results, "loss", *pair), "below"))
            found.append(
                Finding(f"accuracy, difference, {size} pairs", _difference(results, "accuracy", *pair), "above")
            )
        return found

    return findings


def _wins(against: str, arms: Mapping[str, tuple[str, str]]) -> Callable[[Results], Sequence[Finding]]:
    """Win rates over ``against``: label -> arm, and on which side of 50 % the claim puts it."""

    def findings(results: Results) -> Sequence[Finding]:
        return [
            Finding(f"{label}, win rate in %", _rate(results, arm, against), side, 50.0)
            for label, (arm, side) in arms.items()
        ]

    return findings


def _quality_of_reward_models(results: Results) -> Sequence[Finding]:
    """Each reward model against the next better one, by win rates over the policy trained on the ground truth."""
    truth = "bwd"
    return [
        *(
            Finding(
                f"{worse} less all pairs, win rate over ground truth, points",
                _rate_difference(results, f"learned_{worse}", "learned_many", truth),
                "below",
            )
            for worse in ("few", "noisy")
        ),
        Finding("all pairs over ground truth, win rate in %", _rate(results, "learned_many", truth), "below", 50.0),
    ]


# Label -> arm, and the claimed side of its win rate over RAO.
BASELINES = {
    "DPO": ("dpo", "below"),
    "IPO": ("ipo", "below"),
    "SimPO": ("simpo", "below"),
    "Cal-DPO": ("cal_dpo", "below"),
    "robust RPO": ("robust_po", "below"),
    "DRO": ("dro", "below"),
    "RLHF (PPO)": ("ppo", "below"),
}

CLAIMS = (
    Claim(
        RAO, "Under DPO the log-probability of chosen responses falls.", "rao_likelihood", _likelihood("dpo", "below")
    ),
    Claim(RAO, "Under RAO it does not fall.", "rao_likelihood", _likelihood("rao", "above")),
    Claim(
        RAO,
        "log Z_0 moves the mean of implicit rewards, by -β for each nat.",
        "rao_z0_beta",
        _relations("mean over log_z0", "slope, per nat", margin=0.02),
    ),
    Claim(
        RAO,
        "The same with the log-ratio of the prompt, which log Z(x) contains.",
        "rao_z0_beta",
        _relations("mean with prompt over log_z0", "slope, per nat", margin=0.02),
    ),
    Claim(
        RAO,
        "log Z_0 does not change the gap between responses.",
        "rao_z0_beta",
        _relations("gap over log_z0", "slope, per nat", margin=0.02),
    ),
    Claim(
        RAO,
        "β sets the gap: the gap of log-ratios grows with 1/β.",
        "rao_z0_beta",
        _relation("gap over 1/beta", "slope, nats", "above"),
    ),
    Claim(
        RAO,
        "β does not change the mean of implicit rewards.",
        "rao_z0_beta",
        _relation("mean over beta", "slope", "equal", margin=0.5),
    ),
    Claim(
        RAO,
        "A reward model that starts from SFT beats one that starts from the base model.",
        "rao_table1",
        _reward_models("rm_sft", "rm_base"),
    ),
    Claim(
        RAO,
        "A reward model from the base model beats DPO's implicit reward.",
        "rao_table1",
        _reward_models("rm_base", "dpo"),
    ),
    Claim(
        RAO,
        "RAO's samples win over those of each baseline.",
        "rao_table2",
        _wins("rao", BASELINES),
    ),
    Claim(
        RPO,
        "Explicit rewards beat a constant one (implicit, as in DPO).",
        "rpo_ground_truth",
        _wins("bwd", {"constant reward": ("constant", "below")}),
    ),
    Claim(
        RPO,
        "More responses to a prompt are better.",
        "rpo_ground_truth",
        _wins("bwd", {"K 2 against K 4": ("k_2", "below"), "K 8 against K 4": ("k_8", "above")}),
    ),
    Claim(
        RPO,
        "The better the reward model, the better the policy.",
        "rpo_ground_truth",
        _quality_of_reward_models,
    ),
    Claim(
        RPO,
        "Training on the policy's own samples beats training on given ones.",
        "rpo_ground_truth",
        _wins("bwd", {"online against offline": ("online", "above")}),
    ),
)
UNTESTED = (
    (
        RAO,
        "Reasoning does not fall.",
        "the toy model knows only captions; `rao_table2` has the tasks for a real model",
    ),
)


def keep(folder: Path) -> Path:
    """Copies a study's results, without the commands of its runs and details of each seed's wins, and its figures.

    Raises:
        SystemExit: the study has no results.
    """
    source = folder / "results.json"
    if not source.is_file():
        raise SystemExit(f"{source}: no such file; run the study first")
    results = json.loads(source.read_text())
    for run in results["runs"]:
        del run["command"]
    for of_arms in results["wins"].values():
        for of_arm in of_arms.values():
            of_arm["seeds"] = [{"seed": one["seed"], "rate": one["rate"]} for one in of_arm["seeds"]]
    path = STUDIES / f"{results['study']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for figure in () if path.stem.endswith(CHOOSING) else sorted((folder / "figures").glob("*.svg")):
        shutil.copyfile(figure, FIGURES / f"{results['study']}-{figure.name}")
    return path


def read_studies() -> dict[str, Results]:
    """Name -> results of the studies that were kept."""
    found = {}
    for path in sorted(STUDIES.glob("*.json")):
        found[path.stem] = _with_nan(json.loads(path.read_text()))
    return found


def _with_nan(value: Any) -> Any:
    """``null`` as NaN among the numbers of estimates."""
    if isinstance(value, dict):
        has_numbers = "half_width" in value or "rate" in value
        return {k: math.nan if v is None and has_numbers else _with_nan(v) for k, v in value.items()}
    return [_with_nan(one) for one in value] if isinstance(value, list) else value


BEFORE = """\
# The papers' claims

This page compares the claims of the RAO and RPO papers with the results of the project's
[studies](guides/studies.md), on models and data that fit two CPU cores. A claim *held* if the 95 % confidence interval
over seeds agrees with it, *did not hold* if the interval contradicts it, and is *undecided* otherwise. If the claim is
a value, the interval must lie within a margin of it, which is shown. There is no correction for the number of claims.
`make papers-page` generates the page from `benchmarks/results/studies`.

"""


def page(studies: Mapping[str, Results] | None = None) -> str:
    """The page in Markdown."""
    studies = read_studies() if studies is None else studies
    return BEFORE + "\n".join(_blocks(studies)).rstrip() + "\n"


def _blocks(studies: Mapping[str, Results]) -> Iterator[str]:
    rows = []
    for claim in CLAIMS:
        for name, results in _studies_of(claim.study, studies):
            findings = claim.findings(results)
            verdicts = [one.verdict for one in findings]
            summary = (
                verdicts[0]
                if len(set(verdicts)) == 1
                else ", ".join(
                    f"{verdicts.count(kind)} {kind}" for kind in (HELD, NOT_HELD, UNDECIDED) if kind in verdicts
                )
            )
            numbers = "<br>".join(map(str, findings))
            rows.append([claim.paper, claim.text, f"[{name}](#{name})", numbers, f"**{summary}**"])
        if not _studies_of(claim.study, studies):
            rows.append([claim.paper, claim.text, f"`{claim.study}`", "", "not run"])
    rows += [[paper, text, "", why, "not tested here"] for paper, text, why in UNTESTED]
    header = ["paper", "claim", "study", "measured, mean ± half of the interval", "verdict"]
    yield markdown_table(header, rows, num_text=len(header))
    for name, results in studies.items():
        yield ""
        yield from _choices(name, studies) if name.endswith(CHOOSING) else _study(name, results)


def _studies_of(name: str, studies: Mapping[str, Results]) -> list[tuple[str, Results]]:
    return [(found, results) for found, results in studies.items() if found.rpartition("_")[0] == name]


def _study(name: str, results: Results) -> Iterator[str]:
    yield f"## {name}\n"
    seeds = len(results["seeds"])
    failed = f" {len(results['failed'])} steps failed." if results["failed"] else ""
    yield f"*{results['title']}* {results['about']} {seeds} seeds, {versions_text(results)}.{failed}\n"
    arguments, data = OWN_DATA.get(name, ("", ""))
    if results["seeds"] != list(load_study(name).keys.seeds):
        arguments += f" 'seeds={results['seeds']}'".replace(", ", ",")
    yield f"```\n{f'nemo-rao study {name} {arguments.strip()}'.rstrip()}\n```\n"
    if data:
        yield f"{data} {_prompts(results)}\n"
    arms = {arm: of["label"] for arm, of in measured_arms(results).items()}
    against = list(results["wins"])
    rows = []
    for arm, label in arms.items():
        means = [with_interval(of[arm]["mean"]) for of in results["summaries"].values()]
        wins = [
            percent(results["wins"][other][arm]["rate"]) if arm in results["wins"][other] else "" for other in against
        ]
        rows.append([label, *means, *wins])
    labels = [results["arms"][other]["label"] if other in results["arms"] else other for other in against]
    yield markdown_table(["arm", *results["summaries"], *(f"win rate over {label}, %" for label in labels)], rows)
    widths = [100 * of["rate"]["half_width"] for rates in results["wins"].values() for of in rates.values()]
    widths = [width for width in widths if not math.isnan(width)]
    if widths:
        yield f"\nThe 95 % interval of a win rate is ± {statistics.median(widths):.1f} points (median)."
    if name in REMARKS:
        yield f"\n{REMARKS[name]}"
    for figure in sorted(FIGURES.glob(f"{name}-*.svg")):
        kind = figure.stem.removeprefix(f"{name}-")
        yield f"\n![{name}: {kind}](images/studies/{figure.name})"


def _prompts(results: Results) -> str:
    """Numbers of prompts of each arm, as those with responses that are too long are dropped."""
    counts = []
    for arm, of in measured_arms(results).items():
        runs = [run for run in results["runs"] if run["arm"] == arm and run["state"] == "finished"]
        used = sorted({f"{run['prompts']} and {run['held_out_prompts']}" for run in runs})
        counts.append(f"{of['label']}: {' or '.join(used)}")
    return f"Training and held-out prompts, without those whose responses are too long: {'; '.join(counts)}."


def scores(results: Results) -> dict[str, float]:
    """Arm -> win rate over the start in percent, or loss in a study without samples."""
    found = {
        arm: _rate(results, arm, "start").value if "start" in results["wins"] else _mean(results, "loss", arm).value
        for arm, of in results["arms"].items()
        if not of["once"]
    }
    return {arm: value for arm, value in found.items() if not math.isnan(value)}


def chosen(name: str, studies: Mapping[str, Results]) -> dict[str, tuple[str, str]]:
    """Arm of a study -> the study that chose its settings, and the arm that was best there.

    An arm ``dpo`` has the settings of the best arm ``dpo_VALUE``: that of the highest win rate, or of the lowest loss.
    """
    best: dict[str, tuple[float, str, str]] = {}
    for ending in CHOOSING if name.endswith("_toy") else ():
        choosing = name.removesuffix("_toy") + ending
        results = studies.get(choosing)
        if results is None:
            continue
        sign = 1 if "start" in results["wins"] else -1
        for arm, value in scores(results).items():
            base = arm.rpartition("_")[0]
            best[base] = max(best.get(base, (-math.inf, "", "")), (sign * value, choosing, arm))
    return {base: (choosing, arm) for base, (_, choosing, arm) in best.items()}


def _choices(name: str, studies: Mapping[str, Results]) -> Iterator[str]:
    results = studies[name]
    of = name.removesuffix(next(one for one in CHOOSING if name.endswith(one))) + "_toy"
    what = "win rate over the start, %, and KL of samples" if "start" in results["wins"] else "loss"
    yield f"## {name}\n"
    by_one = len(results["seeds"]) == 1
    seeds = "1 seed" if by_one else f"{len(results['seeds'])} seeds"
    caution = " A choice by one seed favors settings whose results vary." if by_one else ""
    yield (
        f"*{results['title']}* {results['about']} {seeds}, {versions_text(results)}. "
        f"[{of}](#{of}) uses the settings in bold, the best of all studies that choose for it, with other seeds."
        f"{caution}\n"
    )
    yield f"```\nnemo-rao study {name}\n```\n"
    bold = {arm for study, arm in chosen(of, studies).values() if study == name}
    rows: dict[str, list[str]] = {}
    for arm, value in scores(results).items():
        base, _, setting = arm.rpartition("_")
        text = f"{float(setting):g}: {shown(value)}"
        ratio = _mean(results, KL, arm).value if KL in results["summaries"] else math.nan
        text += "" if math.isnan(ratio) else f" at {ratio:.1f} nats"
        rows.setdefault(base, []).append(f"**{text}**" if arm in bold else text)
    yield markdown_table(
        ["arm", f"value: {what}"], [[f"`{base}`", ", ".join(of)] for base, of in rows.items()], num_text=2
    )


def main() -> int:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = command.add_subparsers(dest="part")
    keeping = parts.add_parser("keep", help="copy results and figures of studies")
    keeping.add_argument("folders", nargs="+", type=Path, help="directories of studies")
    arguments = command.parse_args()
    if arguments.part == "keep":
        for folder in arguments.folders:
            print(keep(folder))
        return 0
    sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
