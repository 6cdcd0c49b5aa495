"""The same loss, gradient norm and metrics however the model and the batch are split, and the batch is laid out.

All combinations of the three switches are run on one rank, and under every split with ``--every-combination``; else
under every split as recipes have them, and under some with all of them on.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest

from ..slow import slow_but
from .runs import FOUR_LAYERS, NO_CHECKPOINTS, parallel, run_training, steps

LAYOUTS = {  # name: (TP, PP, DP x CP), micro-batch size
    "one rank": ((1, 1, 1), 4),
    "one rank, small micro-batches": ((1, 1, 1), 1),
    "TP 2": ((2, 1, 1), 4),
    "TP 2, small micro-batches": ((2, 1, 1), 1),
    "PP 2": ((1, 2, 1), 4),
    "PP 2, small micro-batches": ((1, 2, 1), 1),
    "TP 2 x PP 2": ((2, 2, 1), 4),
    "TP 2 x PP 2, small micro-batches": ((2, 2, 1), 1),
    "DP 2": ((1, 1, 2), 4),
    "DP 2, small micro-batches": ((1, 1, 2), 1),
    "TP 2, sequence parallel": ((2, 1, 1), 2),
    "CP 2": ((1, 1, 2), 4),
    "CP 2, small micro-batches": ((1, 1, 2), 1),
    "CP 2 x TP 2, sequence parallel": ((2, 1, 2), 2),
    "CP 2 x PP 2": ((1, 2, 2), 2),
    "PP 2, interleaved": ((1, 2, 1), 1),
    "PP 2 x TP 2, interleaved": ((2, 2, 1), 2),
    "DP 2, overlapped": ((1, 1, 2), 2),
    "DP 2 x PP 2, interleaved, overlapped": ((1, 2, 2), 1),
}
FURTHER = (
    ("sequence parallel", "model.sequence_parallel=true"),
    ("CP 2", "model.context_parallel_size=2"),
    ("interleaved", "model.virtual_pipeline_model_parallel_size=2"),
    ("overlapped", "model.optim.overlap_grad_reduce=true"),
    ("overlapped", "model.optim.overlap_param_gather=true"),
)
# Without --every-combination, layouts of these: what a split does to sums of rows is the same for any objective.
OF_DPO = ("one rank", "TP 2 x PP 2", "DP 2, small micro-batches", "CP 2", "PP 2, interleaved")
ALL_SWITCHED_ON = (
    *("one rank", "TP 2", "PP 2", "DP 2", "TP 2, sequence parallel"),
    *("CP 2", "CP 2 x TP 2, sequence parallel", "PP 2, interleaved"),
)
SWITCHES = ("model.fused_log_probs", "data.packing", "data.prefix_sharing")
PLAIN, DEFAULT, ALL_ON = (False, False, False), (True, False, False), (True, True, True)
EVERY = list(itertools.product((False, True), repeat=len(SWITCHES)))
# The cases that `make test` runs: each kind of parallelism once, and both objectives.
QUICK = [
    ("gpt_rao", "one rank", ALL_ON),
    ("gpt_rao", "TP 2 x PP 2", DEFAULT),
    ("gpt_rao", "CP 2 x TP 2, sequence parallel", ALL_ON),
    ("gpt_rao", "PP 2 x TP 2, interleaved", DEFAULT),
    ("gpt_rao", "DP 2 x PP 2, interleaved, overlapped", DEFAULT),
    ("gpt_dpo", "TP 2 x PP 2", ALL_ON),
]
TOLERANCE = 1e-5
# Differences of log-probabilities may be as near to zero as they like; fp32 sums of their size, tens of nats, are known
# to a few millionths. In nats; rewards are multiplied by beta, 0.1.
ROUNDING = {"rewards/": 1e-6, "rao/prompt_logratio": 1e-5}


def switches_on(switches: tuple[bool, ...]) -> str:
    return "+".join(name.partition(".")[2] for name, on in zip(SWITCHES, switches, strict=True) if on) or "plain"


@functools.cache
def train(
    recipe: str, layout: str, switches: tuple[bool, ...], data: tuple[str, ...], start: Path
) -> list[dict[str, float]]:
    sizes, micro_batch_size = LAYOUTS[layout]
    # A folder of its own: the reference pass, too, runs under this layout.
    folder = start.parent / f"{recipe} {layout} {''.join('ny'[on] for on in switches)}".replace(" ", "_").replace(
        ",", ""
    )
    extra = [key for name, key in FURTHER if name in layout]
    overrides = [
        *FOUR_LAYERS,
        *data,
        *NO_CHECKPOINTS,
        *parallel(*sizes),
        *extra,
        *(f"{name}={on}" for name, on in zip(SWITCHES, switches, strict=True)),
        f"model.micro_batch_size={micro_batch_size}",
        "model.global_batch_size=8",
        f"model.restore_from_path={start}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        "trainer.max_steps=5",
    ]
    run_training(recipe, overrides)
    return steps(folder / "run")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "switches" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("every_combination"):
        cases = list(itertools.product(("gpt_rao", "gpt_dpo"), LAYOUTS, EVERY))
    else:
        cases = [("gpt_rao", "one rank", switches) for switches in EVERY]
        cases += itertools.product(("gpt_rao",), LAYOUTS, (DEFAULT,))
        cases += itertools.product(("gpt_dpo",), OF_DPO, (DEFAULT,))
        cases += itertools.product(("gpt_rao",), ALL_SWITCHED_ON, (ALL_ON,))
        cases += [("gpt_dpo", "TP 2 x PP 2", ALL_ON), ("gpt_dpo", "DP 2, small micro-batches", ALL_ON)]
    metafunc.parametrize(
        ("recipe", "layout", "switches"),
        slow_but(QUICK, (case for case in dict.fromkeys(cases) if case[1:] != ("one rank", PLAIN))),
        ids=lambda value: switches_on(value) if isinstance(value, tuple) else value,
    )


def test_five_steps_are_those_of_one_rank(
    recipe: str, layout: str, switches: tuple[bool, ...], data: tuple[str, ...], deep_start: Path
) -> None:
    """The one rank computes whole logits of rows of their own."""
    expected = train(recipe, "one rank", PLAIN, data, deep_start)
    got = train(recipe, layout, switches, data, deep_start)
    assert len(expected) == len(got) == 5
    # The policy starts as the reference, and the steps move it.
    assert expected[0]["rewards/margins"] == pytest.approx(0, abs=ROUNDING["rewards/"])
    assert abs(expected[-1]["rewards/margins"]) > 100 * ROUNDING["rewards/"]
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        assert {"loss", "grad_norm", "logps/chosen", "rewards/margins"} <= want.keys()
        for name, value in want.items():
            if name == "rewards/accuracies" and want["step"] == 1:
                continue  # the policy is the reference: which of two equal rewards is greater is rounding
            rounding = next((error for prefix, error in ROUNDING.items() if name.startswith(prefix)), 0.0)
            assert have[name] == pytest.approx(value, rel=TOLERANCE, abs=rounding), (want["step"], name)
