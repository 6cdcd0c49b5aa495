"""Runs from one checkpoint are NeMo's in every number format: their reference policy's log-probs, and their steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ..engines import needs_bridge
from ..train.runs import make_data
from .from_checkpoint import NUM_STEPS, RECORDED, RUNS, course, make_start

pytestmark = needs_bridge
TOLERANCE = {"fp32": 1e-5, "KTO": 1e-5, "LoRA": 1e-5}
OF_16_BITS = 1e-3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    return make_start(tmp_path_factory.mktemp("start"), data)


@pytest.mark.parametrize("name", RUNS)
def test_sums_of_the_reference_and_steps_are_those_of_nemos_engine(
    name: str, data: tuple[str, ...], start: Path, tmp_path: Path
) -> None:
    there, here = json.loads(RECORDED.read_text())[name], course(name, tmp_path, data, start)
    tolerance = TOLERANCE.get(name, OF_16_BITS)
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
