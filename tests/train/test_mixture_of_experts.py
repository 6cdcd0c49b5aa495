"""A mixture of experts takes the same steps however its experts, and all else, are split over ranks."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from nemo_rao.config.engine_choice import NEMO, installed_engine

from ..slow import slow_but
from .runs import NO_CHECKPOINTS, TINY, make_data, parallel, run_training, start_checkpoint, steps

LAYOUTS = {  # name: (TP, PP, DP x CP), micro-batch size
    "one rank": ((1, 1, 1), 4),
    "DP 2": ((1, 1, 2), 4),
    "EP 2": ((1, 1, 2), 4),
    "EP 2, small micro-batches": ((1, 1, 2), 1),
    "PP 2": ((1, 2, 1), 4),
    "PP 2 x EP 2, interleaved": ((1, 2, 2), 1),
    "CP 2 x EP 2": ((1, 1, 4), 2),
    "TP 2": ((2, 1, 1), 4),
    "TP 2 x PP 2": ((2, 2, 1), 2),
    "DP 2 x PP 2, interleaved": ((1, 2, 2), 1),
    "CP 2": ((1, 1, 2), 4),
    "TP 2 x EP 2": ((2, 1, 2), 2),
    "TP 2, EP 2 of whole experts": ((2, 1, 1), 4),
}
FURTHER = {
    "EP 2": "model.expert_model_parallel_size=2",
    "whole experts": "model.expert_tensor_parallel_size=1",
    "TP 2": "model.sequence_parallel=true",
    "CP 2": "model.context_parallel_size=2",
    "interleaved": "model.virtual_pipeline_model_parallel_size=2",
}
MIXTURE = (
    *TINY,
    "model.arch.num_layers=4",
    "model.family=mixtral",
    "model.arch.extra={num_moe_experts: 4}",
    # 61 prompts in parts of 10 micro-batches: ranks have different numbers of them, and of parts, in the first pass.
    "data.num_prompts=61",
    "reference.save_every=10",
)
DEFAULT, ALL_ON = (), ("data.packing=true", "data.prefix_sharing=true")
TOLERANCE, ROUNDING = 1e-5, {"rewards/": 1e-6, "rao/prompt_logratio": 1e-5}  # as in test_parallelism.py
# Without --every-combination:
OF_RAO = [*(name for name in LAYOUTS if "EP 2" in name), "TP 2 x PP 2", "DP 2 x PP 2, interleaved", "CP 2"]
OF_DPO = ["PP 2 x EP 2, interleaved"]
QUICK = [("gpt_rao", "TP 2 x EP 2", ALL_ON)]  # of `make test`


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" not in metafunc.fixturenames:
        return
    split = [layout for layout in LAYOUTS if layout != "one rank"]
    of_rao, of_dpo = (split, split) if metafunc.config.getoption("every_combination") else (OF_RAO, OF_DPO)
    cases = [("gpt_rao", layout, DEFAULT) for layout in of_rao] + [("gpt_dpo", layout, DEFAULT) for layout in of_dpo]
    cases += [("gpt_rao", layout, ALL_ON) for layout in ("one rank", "EP 2, small micro-batches", "TP 2 x EP 2")]
    metafunc.parametrize(("recipe", "layout", "switches"), slow_but(QUICK, cases), ids=_name)


def _name(part: str | tuple[str, ...]) -> str:
    return part if isinstance(part, str) else "packed and shared" if part else "rows"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The overrides that name data and the checkpoint that all runs start from, written on one rank."""
    data = make_data(tmp_path_factory.mktemp("mixture_data"))
    start = start_checkpoint(tmp_path_factory.mktemp("mixture"), (*MIXTURE, *data))
    return (*data, f"model.restore_from_path={start}")


@functools.cache
def train(recipe: str, layout: str, switches: tuple[str, ...], given: tuple[str, ...]) -> Path:
    """The folder in which run and reference pass lie."""
    base = Path(given[-1].partition("=")[2]).parent
    folder = base / f"{recipe} {layout} {len(switches)}".replace(" ", "_").replace(",", "")
    run_training(recipe, overrides(folder, layout, (*given, *NO_CHECKPOINTS, *switches, "trainer.max_steps=5")))
    return folder


def overrides(folder: Path, layout: str, further: Sequence[str]) -> list[str]:
    sizes, micro_batch_size = LAYOUTS[layout]
    return [
        *MIXTURE,
        *parallel(*sizes),
        *(key for name, key in FURTHER.items() if name in layout),
        f"model.micro_batch_size={micro_batch_size}",
        "model.global_batch_size=8",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run",
        *further,
    ]


def compare(expected: list[dict[str, float]], got: list[dict[str, float]]) -> None:
    assert len(expected) == len(got) == 5
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        for name, value in want.items():
            if name == "rewards/accuracies" and want["step"] == 1:
                continue  # the policy is the reference: which of two equal rewards is greater is rounding
            rounding = next((error for prefix, error in ROUNDING.items() if name.startswith(prefix)), 0.0)
            assert have[name] == pytest.approx(value, rel=TOLERANCE, abs=rounding), (want["step"], name)


def test_five_steps_are_those_of_one_rank(
    recipe: str, layout: str, switches: tuple[str, ...], given: tuple[str, ...]
) -> None:
    want_folder, folder = train(recipe, "one rank", DEFAULT, given), train(recipe, layout, switches, given)
    compare(steps(want_folder / "run"), steps(folder / "run"))
    # The weights' fingerprint, of which the folder's name is made, sees the same experts.
    passes = [sorted(path.name for path in (one / "reference").iterdir()) for one in (want_folder, folder)]
    assert passes[0] == passes[1] and len(passes[0]) == 1


# Layouts under which a checkpoint is continued; those whose experts are shared have an optimizer of their own for them.
CONTINUED = [
    ("one rank", "TP 2 x PP 2"),
    ("one rank", "DP 2 x PP 2, interleaved"),
    ("one rank", "CP 2"),
    ("one rank", "EP 2"),
    ("EP 2", "PP 2 x EP 2, interleaved"),
]


@pytest.fixture(scope="module")
def begun(given: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> the folder of a run of three steps, with its checkpoint and its reference pass."""

    @functools.cache
    def begin(layout: str) -> Path:
        folder = tmp_path_factory.mktemp("begun")
        run_training("gpt_rao", overrides(folder, layout, (*given, "trainer.max_steps=3")))
        return folder

    return begin


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), CONTINUED, ids=[" to ".join(case) for case in CONTINUED])
def test_a_checkpoint_is_continued_under_another_parallelism(
    before: str, after: str, begun: Callable[[str], Path], given: tuple[str, ...], tmp_path: Path
) -> None:
    shutil.copytree(begun(before), tmp_path, dirs_exist_ok=True)
    again = overrides(tmp_path, after, (*given, "trainer.max_steps=5"))
    if ("EP" in before) != ("EP" in after) and installed_engine() == NEMO:
        with pytest.raises(AssertionError, match="optimizer states of split experts cannot be loaded"):
            run_training("gpt_rao", again)
        return
    run_training("gpt_rao", again)
    compare(steps(train("gpt_rao", "one rank", DEFAULT, given) / "run"), steps(tmp_path / "run"))
