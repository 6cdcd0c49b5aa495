"""Every objective through the real Megatron model on two ranks: it learns under TP 2, and under PP 2 by the same steps.

With --every-combination it is seen to learn under PP 2, too, in twenty steps there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.runtime.metrics_file import read_metrics

from ..slow import slow_but
from .runs import NO_CHECKPOINTS, OF_DATA, TINY, parallel, run_training, steps

# Objective -> its own metric, and by how much 20 steps change that in validation: the smaller change of both engines,
# which draw other initial weights.
OWN = {
    "rao": ("rao/target_error", -0.066),
    "robust_po": ("robust_po/target_error", -0.19),
    "rpo": ("rpo/target_error", -0.095),
    "dro": ("dro/target_error", -0.26),
    "rpo_partition": ("rpo_partition/target_error", -7.0),
    "kimi": ("kimi/target_error", -0.046),
    "agro": ("agro/deviation", -0.079),
    "qrpo": ("qrpo/target_error", -0.048),
    "sft": ("logps/chosen", 9.4),
    "rm": ("rm/brier", -0.037),  # the accuracy of a few pairs moves in steps
    "rm_regression": ("rm/error", -0.25),
}
# The same for the margin of the implicit rewards, which all others raise. Its scale follows from the objective's beta.
MARGINS = {
    "alphapo": 1.6,
    "cal_dpo": 0.0023,
    "dpo": 0.21,
    "dpo_shift": 0.023,
    "dpop": 0.55,
    "hinge": 0.23,
    "ipo": 0.19,
    "kto": 0.07,  # 0.14 with NeMo
    "nca": 0.025,
    "orpo": 0.0097,
    "r_dpo": 0.21,
    "simpo": 0.62,
    "slic": 0.63,
    "sppo": 0.0023,
}
SHARE = 0.5  # of that change, the least that passes
TP_2, PP_2 = parallel(2, 1, 1), parallel(1, 2, 1)
SAME = 3  # steps that are compared
# Of `make test`: each of these reads something of the batch, or trains something, that the others do not.
QUICK = ["rao", "kto", "dro", "rm"]
KEYS = {"kto": ("threshold=0.6",), "dro": ("value_lr=0.05",)}


@dataclass(frozen=True)
class Runs:
    """Start and data of all objectives' runs, which are validated on a few of their training prompts."""

    start: Path
    data: tuple[str, ...]


@functools.cache
def train(runs: Runs, name: str, layout: tuple[str, ...], num_steps: int) -> Path:
    needs = OBJECTIVES[name].needs_of(OBJECTIVES[name].config_type())
    kind = "objectives" if needs.reference else "reference-free objectives"
    folder = runs.start.parent / kind / ("TP2" if layout == TP_2 else "PP2")
    overrides = [
        *TINY,
        *NO_CHECKPOINTS,
        *runs.data,
        *layout,
        f"model.objective={name}",
        *(f"model.{name}.{key}" for key in KEYS.get(name, ())),
        "model.global_batch_size=8",
        "model.micro_batch_size=8",
        f"model.restore_from_path={runs.start}",
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}-{num_steps}",
        "trainer.max_epochs=null",
        f"trainer.max_steps={num_steps}",
    ]
    run_training("gpt_rao", overrides)
    assert (folder / "reference").exists() == needs.reference
    return folder / f"{name}-{num_steps}"


@pytest.fixture(scope="module")
def runs(data: tuple[str, ...], start: Path) -> Runs:
    train_path = Path(data[0].partition("=")[2])
    validation_path = train_path.with_name("some.jsonl")
    with train_path.open() as rows:
        validation_path.write_text("".join(itertools.islice(rows, 16)))
    return Runs(start, (*data, f"data.validation_path={validation_path}"))


@pytest.mark.parametrize("name", slow_but(QUICK, OF_DATA))
def test_twenty_steps_move_its_own_metric_as_far_as_before(
    name: str, runs: Runs, table: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    metric, change = OWN[name] if name in OWN else ("rewards/margins", MARGINS[name])
    both = request.config.getoption("every_combination")
    for layout, sizes in {"TP 2": TP_2, "PP 2": PP_2}.items() if both else [("TP 2", TP_2)]:
        records = read_metrics(train(runs, name, sizes, 20) / "metrics.jsonl")
        validations = [record for record in records if f"val/{metric}" in record]
        before, after = (record[f"val/{metric}"] for record in validations)
        table(name, layout, metric, f"{before:.4f}", f"{after:.4f}")
        assert [record["step"] for record in validations] == [0, 20]
        assert (after - before) / change > SHARE, (layout, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_DATA)
def test_its_first_steps_are_the_same_in_a_pipeline(name: str, runs: Runs) -> None:
    courses = [steps(train(runs, name, TP_2, 20)), steps(train(runs, name, PP_2, SAME))]
    for one, same in zip(*(course[:SAME] for course in courses), strict=True):
        for key, value in one.items():
            if key == "lr" or (key == "rewards/accuracies" and one["step"] == 1):
                continue  # which of two equal rewards is greater is rounding
            assert same[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
