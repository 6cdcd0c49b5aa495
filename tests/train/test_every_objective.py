"""Every objective through the real Megatron model on two ranks: it learns under TP 2, and under PP 2 by the same steps.

With --every-combination it is seen to learn under PP 2, too: twenty steps there instead of three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.runtime.metrics_file import read_metrics

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
LAYOUTS = {"TP 2": parallel(2, 1, 1), "PP 2": parallel(1, 2, 1)}
SAME = 3  # steps that are compared
KEYS = {"kto": ("threshold=0.6",), "dro": ("value_lr=0.05",)}


def train(name: str, layout: tuple[str, ...], folder: Path, start: Path, *extra: str) -> Path:
    overrides = [
        *TINY,
        *NO_CHECKPOINTS,
        *layout,
        f"model.objective={name}",
        *(f"model.{name}.{key}" for key in KEYS.get(name, ())),
        "model.global_batch_size=8",
        "model.micro_batch_size=8",
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        f"exp_manager.name={name}",
        "trainer.max_epochs=null",
        *extra,
    ]
    run_training("gpt_rao", overrides)
    return folder / name


@pytest.mark.parametrize("name", OF_DATA)
def test_twenty_steps_move_its_own_metric_as_far_as_before(
    name: str, data: tuple[str, ...], start: Path, table: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    metric, change = OWN[name] if name in OWN else ("rewards/margins", MARGINS[name])
    train_path = Path(data[0].partition("=")[2])
    validation_path = train_path.with_name("some.jsonl")
    with train_path.open() as rows:
        validation_path.write_text("".join(itertools.islice(rows, 16)))
    needs = OBJECTIVES[name].needs_of(OBJECTIVES[name].config_type())
    folder = start.parent / ("objectives" if needs.reference else "reference-free objectives")
    overrides = (*data, f"data.validation_path={validation_path}")
    whole = ("TP 2", "PP 2") if request.config.getoption("every_combination") else ("TP 2",)
    courses = []
    for layout, sizes in LAYOUTS.items():
        num_steps = 20 if layout in whole else SAME
        run = train(name, sizes, folder / layout.replace(" ", ""), start, *overrides, f"trainer.max_steps={num_steps}")
        assert (run.parent / "reference").exists() == needs.reference
        courses.append(steps(run))
        if layout not in whole:
            continue
        validations = [record for record in read_metrics(run / "metrics.jsonl") if f"val/{metric}" in record]
        before, after = (record[f"val/{metric}"] for record in validations)
        table(name, layout, metric, f"{before:.4f}", f"{after:.4f}")
        assert [record["step"] for record in validations] == [0, 20]
        assert (after - before) / change > SHARE, (layout, before, after)

    for one, same in zip(*(course[:SAME] for course in courses), strict=True):
        for key, value in one.items():
            if key == "lr" or (key == "rewards/accuracies" and one["step"] == 1):
                continue  # which of two equal rewards is greater is rounding
            assert same[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
