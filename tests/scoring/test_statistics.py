"""Statistics of columns, against the standard library."""

import random
import statistics

import pytest

from nemo_rao.scoring.statistics import Collector


def collected(*rows: tuple[float | None, ...]) -> Collector:
    collector = Collector(["r"])
    for row in rows:
        collector.add({"r": row}, ranked=False)
    return collector


def test_a_distribution_is_exact_in_any_order() -> None:
    draw = random.Random(0)
    values = [draw.gauss(5, 2) for _ in range(1001)]
    for ordered in (values, sorted(values, reverse=True)):
        found = collected(*((one, None) for one in ordered)).distributions()["r"]
        assert (found.count, found.missing) == (1001, 1001)
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        assert [found.q1, found.median, found.q3] == pytest.approx(quartiles, rel=1e-15)
        assert (found.min, found.max) == (min(values), max(values))
        assert [found.mean, found.sd] == pytest.approx([statistics.fmean(values), statistics.pstdev(values)], rel=1e-13)


def test_equal_values_have_no_deviation() -> None:
    found = collected(*[(0.1,)] * 1000).distributions()["r"]
    assert (found.mean, found.sd) == (0.1, 0.0)


def test_a_column_without_values_has_only_counts() -> None:
    found = collected((None, None), (None,)).distributions()["r"]
    assert (found.count, found.missing, found.mean, found.max) == (0, 3, None, None)
