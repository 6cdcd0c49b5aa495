"""The first steps of each objective and online recipe on Bridge's engine are those of NeMo's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..engines import needs_bridge
from ..train.runs import OF_DATA, make_data
from .five_steps import NUM_STEPS, ONLINE, RECORDED, fingerprint, run, start_of_online
from .nemo_results import ON_ANOTHER_CPU, nemo_results

pytestmark = needs_bridge
# DPOP's hinge is at 0 and begins there, so that rounding decides its slope; DRO learns V at a high rate; a draw on the
# border between two tokens may fall to either side.
AMPLIFY_ROUNDING = ("dpop", "dro", *ONLINE)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bool]:
    return nemo_results("tests.bridge.five_steps", RECORDED, tmp_path_factory.mktemp("nemo"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_of_online(tmp_path_factory.mktemp("online"), data)


@pytest.mark.parametrize("name", [*OF_DATA, *ONLINE])
def test_loss_gradient_norm_and_metrics_are_those_of_nemos_engine(
    name: str, data: tuple[str, ...], nemo: tuple[dict[str, Any], bool], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recorded, is_of_this_cpu = nemo
    if name in AMPLIFY_ROUNDING and not is_of_this_cpu:
        pytest.skip(ON_ANOTHER_CPU)
    made = run(name, tmp_path, data, *([request.getfixturevalue("start")] if name in ONLINE else []))
    assert fingerprint(tmp_path, name) == recorded["data"][name]
    assert len(made) == len(recorded["steps"][name]) == NUM_STEPS
    for here, there in zip(made, recorded["steps"][name], strict=True):
        assert here.keys() == there.keys()
        for key, value in there.items():
            if key == "rewards/accuracies" and here["step"] == 1:
                continue  # which of two equal rewards is greater is rounding
            assert here[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (here["step"], key)
