"""docs/online_results.md says what the figures say, and the figures what the page is for."""

import json
from pathlib import Path

from benchmarks.online import CONTROL, RECIPES, rise
from benchmarks.online_page import page
from benchmarks.results import FOLDER

PAGE = Path(__file__).resolve().parents[2] / "docs" / "online_results.md"


def test_the_page_is_made_of_the_figures() -> None:
    assert PAGE.read_text() == page(), "python -m benchmarks.online_page > docs/online_results.md"


def test_every_recipe_learns_and_random_rewards_teach_nothing() -> None:
    runs = json.loads((FOLDER / "online.json").read_text())["runs"]
    assert set(runs) == {*RECIPES, CONTROL} and all(len(of_recipe) >= 3 for of_recipe in runs.values())
    for name, of_recipe in runs.items():
        middle, half = rise(of_recipe)
        assert middle - half > 0 if name in RECIPES else middle - half <= 0
