"""Each objective's first steps on Bridge's engine are those of NeMo's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..engines import needs_bridge
from ..train.runs import OF_DATA, make_data
from .five_steps import NUM_STEPS, RECORDED, fingerprint, run

pytestmark = needs_bridge


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", OF_DATA)
def test_loss_gradient_norm_and_metrics_are_those_of_nemos_engine(
    name: str, data: tuple[str, ...], tmp_path: Path
) -> None:
    recorded = json.loads(RECORDED.read_text())
    made = run(name, tmp_path, data)
    assert fingerprint(tmp_path, name) == recorded["data"][name]
    assert len(made) == len(recorded["steps"][name]) == NUM_STEPS
    for here, there in zip(made, recorded["steps"][name], strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            if key == "rewards/accuracies" and here["step"] == 1:
                continue  # which of two equal rewards is greater is rounding
            assert here[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (here["step"], key)
