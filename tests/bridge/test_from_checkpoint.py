"""Runs from one checkpoint are NeMo's in every number format: their reference policy's log-probs, and their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..engines import needs_bridge
from ..train.runs import make_data
from .from_checkpoint import NUM_STEPS, RECORDED, RUNS, course, make_start
from .nemo_results import ON_ANOTHER_CPU, nemo_results

pytestmark = needs_bridge
TOLERANCE = {"fp32": 1e-5, "KTO": 1e-5, "LoRA": 1e-5}
OF_16_BITS = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    return make_start(tmp_path_factory.mktemp("start"), data)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bool]:
    return nemo_results("tests.bridge.from_checkpoint", RECORDED, tmp_path_factory.mktemp("nemo"))


@pytest.mark.parametrize("name", RUNS)
def test_sums_of_the_reference_and_steps_are_those_of_nemos_engine(
    name: str, data: tuple[str, ...], start: Path, nemo: tuple[dict[str, Any], bool], tmp_path: Path
) -> None:
    recorded, is_of_this_cpu = nemo
    tolerance = TOLERANCE.get(name, OF_16_BITS)
    if tolerance == OF_16_BITS and not is_of_this_cpu:
        pytest.skip(ON_ANOTHER_CPU)
    there, here = recorded[name], course(name, tmp_path, data, start)
    assert here["data"] == there["data"]
    assert len(here["reference"]) == len(there["reference"]) == 1 + (name == "KTO")  # its mismatched rows
    for mine, theirs in zip(here["reference"], there["reference"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    assert len(here["steps"]) == len(there["steps"]) == NUM_STEPS
    for mine, theirs in zip(here["steps"], there["steps"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not (key == "rewards/accuracies" and mine["step"] == 1):  # which of two equal rewards is greater
                assert mine[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (mine["step"], key)
