"""docs/performance.md says what the figures say, and the pipeline played in it is the one of the formula."""

from pathlib import Path

import pytest

from benchmarks.page import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_the_page_is_made_of_the_figures() -> None:
    assert PAGE.read_text() == page(), "make bench-page"


@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 8), (4, 4), (4, 2), (8, 32)])
def test_equal_stages_wait_as_long_as_the_formula_says(p: int, m: int) -> None:
    from benchmarks.scaling import idle_of_1f1b

    stages = [{"forward-compute": 1.0 * m, "backward-compute": 2.0 * m}] * p
    assert idle_of_1f1b(stages, m) == pytest.approx((p - 1) / (m + p - 1))
