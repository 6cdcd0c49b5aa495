"""docs/performance.md follows from the measured rounds, and the pipeline played in it is the one of the formula."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.page import page
from benchmarks.results import FOLDER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "make bench-page"


def cells(section: str) -> dict[str, list[str]]:
    """The first cell of each row of a section's tables -> the others."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {first.strip("`"): others for first, *others in rows}


@pytest.mark.parametrize(("result", "title"), [("step", "generated answers"), ("step_alpaca_eval", "alpaca eval")])
def test_ratios_and_rates_on_the_page_are_those_of_the_rounds(result: str, title: str) -> None:
    """Computed here from the seconds of each round, and not with the code that writes results or pages."""
    report: dict[str, Any] = json.loads((FOLDER / f"{result}.json").read_text())
    printed = cells(PAGE.read_text().partition(f"## Steps: {title}\n")[2].partition("\n## ")[0])
    rounds = {name: variant["seconds"] for name, variant in report["variants"].items()}
    assert len(rounds) >= 5 and len(report["ratios"]) >= 5
    for name, seconds in rounds.items():
        samples = report["arguments"]["batch"]
        assert printed[name][:2] == [f"{samples / median(seconds):.2f}", f"{samples / min(seconds):.2f}"]
    for name in report["ratios"]:
        one, other = (rounds[variant] for variant in name.split(" / "))
        ratios = [a / b for a, b in zip(one, other, strict=True)]
        assert printed[name][:2] == [f"{median(ratios):.2f}", f"{min(one) / min(other):.2f}"], name


def test_a_goal_is_reached_where_all_of_its_ratios_are() -> None:
    goals = PAGE.read_text().partition("## Goals\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in goals.splitlines() if line.count(" | ") == 7]
    _, *found = [row for row in rows if "---" not in row[0]]
    assert len(found) >= 10
    for *_, ratio, of_minima, of_cpu, limit, verdict in found:
        # Two decimals cannot tell a ratio at its limit from one above.
        worst = max(float(ratio), float(of_minima), float(of_cpu))
        assert worst == float(limit) or verdict.startswith("yes") == (worst < float(limit)), (worst, limit, verdict)


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 8), (4, 4), (4, 2), (8, 32)])
def test_equal_stages_wait_as_long_as_the_formula_says(p: int, m: int) -> None:
    from benchmarks.scaling import idle_of_1f1b

    stages = [{"forward-compute": 1.0 * m, "backward-compute": 2.0 * m}] * p
    assert idle_of_1f1b(stages, m) == pytest.approx((p - 1) / (m + p - 1))
