"""A mixture of experts takes the same steps however its experts, and all else, are split over ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

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
OF_RAO = [name for name in LAYOUTS if "EP 2" in name]
OF_DPO = ["PP 2 x EP 2, interleaved"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" not in metafunc.fixturenames:
        return
    split = [layout for layout in LAYOUTS if layout != "one rank"]
    of_rao, of_dpo = (split, split) if metafunc.config.getoption("every_combination") else (OF_RAO, OF_DPO)
    cases = [("gpt_rao", layout, DEFAULT) for layout in of_rao] + [("gpt_dpo", layout, DEFAULT) for layout in of_dpo]
    cases += [("gpt_rao", layout, ALL_ON) for layout in ("one rank", "EP 2, small micro-batches", "TP 2 x EP 2")]
    metafunc.parametrize(("recipe", "layout", "switches"), cases, ids=_name)


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
    sizes, micro_batch_size = LAYOUTS[layout]
    base = Path(given[-1].partition("=")[2]).parent
    folder = base / f"{recipe} {layout} {len(switches)}".replace(" ", "_").replace(",", "")
    run_training(
        recipe,
        [
            *MIXTURE,
            *given,
            *NO_CHECKPOINTS,
            *parallel(*sizes),
            *(key for name, key in FURTHER.items() if name in layout),
            *switches,
            f"model.micro_batch_size={micro_batch_size}",
            "model.global_batch_size=8",
            f"exp_manager.exp_dir={folder}",
            "exp_manager.name=run",
            "trainer.max_steps=5",
        ],
    )
    return folder


def test_five_steps_are_those_of_one_rank(
    recipe: str, layout: str, switches: tuple[str, ...], given: tuple[str, ...]
) -> None:
    want_folder, folder = train(recipe, "one rank", DEFAULT, given), train(recipe, layout, switches, given)
    expected, got = steps(want_folder / "run"), steps(folder / "run")
    assert len(expected) == len(got) == 5
    for want, have in zip(expected, got, strict=True):
        assert want.keys() == have.keys()
        for name, value in want.items():
            if name == "rewards/accuracies" and want["step"] == 1:
                continue  # the policy is the reference: which of two equal rewards is greater is rounding
            rounding = next((error for prefix, error in ROUNDING.items() if name.startswith(prefix)), 0.0)
            assert have[name] == pytest.approx(value, rel=TOLERANCE, abs=rounding), (want["step"], name)
    # The weights' fingerprint, of which the folder's name is made, sees the same experts.
    passes = [sorted(path.name for path in (one / "reference").iterdir()) for one in (want_folder, folder)]
    assert passes[0] == passes[1] and len(passes[0]) == 1


def test_a_run_goes_on_with_its_experts_on_other_ranks(given: tuple[str, ...], tmp_path: Path) -> None:
    """Shared before and after: Megatron has an optimizer of their own for experts that are."""
    common = [*MIXTURE, *given, "model.global_batch_size=8", f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"]
    shared = [*parallel(1, 1, 2), FURTHER["EP 2"]]
    run_training("gpt_rao", [*common, *shared, "trainer.max_steps=3"])
    split = [*parallel(1, 2, 2), FURTHER["EP 2"]]
    run_training("gpt_rao", [*common, *split, "trainer.max_steps=5"])
    expected = steps(train("gpt_rao", "one rank", DEFAULT, given) / "run")
    losses = [step["loss"] for step in steps(tmp_path / "run")]
    assert losses == pytest.approx([step["loss"] for step in expected], rel=TOLERANCE)
