"""Every recipe of a large model fits its GPUs, and each of its ranks builds what the planner says it holds.

The parts of all ranks together are the published model, each parameter once: no vocabulary is padded, as recipes name
the rows that the published embeddings have, and every tensor-parallel size divides them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from nemo_rao.config.compose import compose, package_recipes
from nemo_rao.config.derived import world_size
from nemo_rao.config.gpu_models import GIB, GPUS
from nemo_rao.config.run_config import RunConfig
from nemo_rao.planning.memory import peak
from nemo_rao.planning.parameters import model_parameters, stage_parameters
from nemo_rao.planning.plan import setting_of
from nemo_rao.planning.setting import Setting

from ..engines import needs_nemo
from ..planning.children import in_child
from ..slow import slow_but
from .meta_ranks import Part, build_parts, parts_of

# Model: its published parameters, its layers, ranks of its recipes.
MODELS = {
    "llama3_8b": (8_030_261_248, 32, 8),
    "llama3_70b": (70_553_706_496, 80, 64),
    "llama3_70b_lora": (70_553_706_496, 80, 8),
    "llama3_1_405b": (405_853_388_800, 126, 512),
    "qwen2_5_7b": (7_615_616_512, 28, 8),
    "qwen2_5_72b": (72_706_203_648, 80, 32),
    "qwen3_8b": (8_190_735_360, 36, 8),
    "qwen3_32b": (32_762_123_264, 64, 16),
    "qwen3_30b_a3b": (30_532_122_624, 48, 16),
    "eurollm_9b": (9_152_319_488, 42, 8),
    "mixtral_8x7b": (46_702_792_704, 32, 64),
}
OF_THE_PAPER = {"llama3_8b", "qwen2_5_7b", "eurollm_9b"}
QUICK = ["llama3_8b"]
RUNS = [(objective, model) for model in MODELS for objective in ("rao", "dpo")]
ROOT = Path(__file__).resolve().parents[2]
RESERVE = 4 * GIB  # the planner's own


@functools.cache
def recipe(objective: str, model: str) -> RunConfig:
    """RAO's recipe of the model; DPO's with the model's files, and for the paper's three models its setting."""
    if objective == "rao":
        return compose(f"gpt_rao_{model}")
    paper = ["paper=rao_2026_baselines"] if model in OF_THE_PAPER else []
    return compose(f"gpt_{objective}", [f"model={model}", "precision=bf16_mixed", *paper])


@pytest.fixture(scope="module", params=slow_but(QUICK, MODELS))
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(model: str) -> dict[Part, list[dict[str, Any]]]:
    return in_child(build_parts, (recipe("rao", model),))


def test_every_large_model_of_conf_is_here() -> None:
    small = {"tiny_llama", "demo_llama", "smollm2_135m"}
    assert {path.stem for path in package_recipes().glob("model/*.yaml")} - small == set(MODELS)


def test_smollm2_is_planned_as_published_and_fits_a_laptop() -> None:
    setting = setting_of(compose("gpt_rao", ["model=smollm2_135m"]), responses=4)
    assert model_parameters(setting) == 134_515_008
    assert peak(setting) < 12 * GIB


@pytest.mark.parametrize(("objective", "model_name"), RUNS)
def test_a_recipe_is_planned_and_fits_gpus_of_80_gb(objective: str, model_name: str) -> None:
    config = recipe(objective, model_name)
    parameters, _, ranks = MODELS[model_name]
    setting = setting_of(config)
    assert model_parameters(setting) == parameters
    assert world_size(config) == ranks and config.trainer.devices == 8
    assert peak(setting) < GPUS["h100"].memory_gib * GIB - RESERVE
    optim = config.model.optim
    assert optim.use_distributed_optimizer and config.model.sequence_parallel
    # Gradients are reduced, and weights gathered, behind computation wherever there is more than one copy of them.
    assert optim.overlap_grad_reduce == (setting.shards > 1)


@pytest.mark.parametrize("model_name", MODELS)
def test_both_objectives_of_a_model_are_split_alike(model_name: str) -> None:
    """So that what is built of one is what the other builds."""
    rao, dpo = (setting_of(recipe(objective, model_name)) for objective in ("rao", "dpo"))
    assert rao == dpo


def row(model_name: str) -> str:
    """Of docs/guides/recipes.md."""
    setting = setting_of(recipe("rao", model_name))
    sizes = (setting.tensor, setting.pipeline, setting.virtual, setting.context, setting.expert, setting.data)
    cells = [f"`{model_name}`", setting.ranks, *sizes, setting.length, f"{peak(setting) / GIB:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def test_the_page_of_recipes_has_these_layouts() -> None:
    page = (ROOT / "docs" / "guides" / "recipes.md").read_text().partition("## Large models")[2]
    assert [line for line in page.splitlines() if line.startswith("| `")] == [row(name) for name in MODELS]


def test_each_rank_builds_the_layers_and_parameters_that_are_planned(
    model: str, built: dict[Part, list[dict[str, Any]]]
) -> None:
    config = recipe("rao", model)
    setting = setting_of(config)
    assert set(built) == set(parts_of(config)) and len(built) == number_of_parts(setting)
    for part, chunks in built.items():
        planned = [(parameter.name, parameter.size) for parameter in stage_parameters(setting, part.stage)]
        assert planned == [named for chunk in chunks for named in chunk["parameters"]]
        layers = [setting.layers_of_chunk(part.stage, chunk) for chunk in range(setting.virtual)]
        assert layers == [len(chunk["layers"]) for chunk in chunks]


@needs_nemo
def test_the_loss_has_the_recipes_own_block_and_checkpoints_plain_values(
    built: dict[Part, list[dict[str, Any]]],
) -> None:
    for chunk in (chunk for chunks in built.values() for chunk in chunks):
        assert chunk["loss has the recipe's keys"] and chunk["kept for checkpoints"] is dict


def test_the_parts_of_all_ranks_are_the_published_model(model: str, built: dict[Part, list[dict[str, Any]]]) -> None:
    parameters, num_layers, _ = MODELS[model]
    total, counted, layers = 0, set(), []
    for part, chunks in built.items():
        if (part.tensor, part.expert) == (0, 0):
            layers += [number for chunk in chunks for number in chunk["layers"]]
        for location, (name, size) in enumerate(named for chunk in chunks for named in chunk["parameters"]):
            holder = (part.stage, location, *ranks_that_split(name, part))
            if holder not in counted and ".adapter." not in name:
                total += size
            counted.add(holder)
    assert sorted(layers) == list(range(1, num_layers + 1))
    assert total == parameters


def number_of_parts(setting: Setting) -> int:
    """Of each stage: what splits layers, and what splits experts, in as many ways as both are numbered alike."""
    split = setting.expert * setting.of_expert
    return setting.pipeline * max(setting.tensor, split)


def ranks_that_split(name: str, part: Part) -> tuple[int, ...]:
    """Which of the parts of a parameter this is; nothing where all ranks of the stage hold it whole."""
    if "local_experts" in name:
        return (part.expert, part.of_expert)
    return () if "norm" in name or "router" in name else (part.tensor,)
