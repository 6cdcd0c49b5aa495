"""A checkpoint of either engine starts a run on either, which takes the steps of the engine's own run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_rao.config.engine_choice import BRIDGE, NEMO

from .runs import parallel
from .starts import data, run, unpack


@pytest.mark.parametrize("engine", [NEMO, BRIDGE])
def test_a_run_takes_the_steps_of_the_engine_that_wrote_its_start(engine: str, tmp_path: Path) -> None:
    unpack(engine, tmp_path)
    given = (*data(tmp_path / "data"), *parallel(2, 2, 1), "model.sequence_parallel=true")
    taken, recorded = run(tmp_path / "start", tmp_path, given), json.loads((tmp_path / "steps.json").read_text())
    assert len(taken) == len(recorded) == 3
    for here, there in zip(taken, recorded, strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            if key == "rewards/accuracies" and here["step"] == 1:
                continue  # which of two equal rewards is greater is rounding
            assert here[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (here["step"], key)
