"""Cases of a test that ``make test`` leaves to ``make test-all``, where a few of many show that the mechanism works."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest


class OnDemand(dict[str, Any]):
    """Name -> value, computed when it is first needed: a fixture for cases of which some are slow.

    Args:
        compute: the value of a name.
    """

    def __init__(self, compute: Callable[[str], Any]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, name: str) -> Any:
        self[name] = value = self._compute(name)
        return value


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases for ``pytest.mark.parametrize``, all but the quick ones marked slow.

    Args:
        quick: cases that ``make test`` runs; each must be one of ``cases``.
        cases: values of the parameter, or tuples of the values of several parameters.
    """
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [case if case in quick else _slow(case) for case in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
