"""Every objective has its settings and its recipe, and the RAO paper's runs are there, each within its grid."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_rao.config.compose import compose, recipe_names
from nemo_rao.config.derived import objective_config
from nemo_rao.config.run_config import RunConfig
from nemo_rao.objectives.registry import OBJECTIVES
from nemo_rao.training.checks import check_run

CONF = Path(__file__).resolve().parents[2] / "conf"
RECIPES = recipe_names([CONF])
PAPER_OBJECTIVES = ("rao", "dpo", "ipo", "slic", "simpo", "orpo", "robust_po", "dro")
PAPER_MODELS = {"llama3_8b": ("llama", 32), "qwen2_5_7b": ("qwen2", 28), "eurollm_9b": ("llama", 42)}
QWEN3 = ("qwen3_8b", "qwen3_32b", "qwen3_30b_a3b")
LARGER_MODELS = ("llama3_70b", "llama3_70b_lora", "llama3_1_405b", "qwen2_5_72b", "mixtral_8x7b", *QWEN3)
ONLINE = ("rloo", "grpo", "ppo", "rpo_online", "rao_online")
PAPER_RUNS = [(objective, model) for objective in PAPER_OBJECTIVES for model in PAPER_MODELS]


@functools.cache
def recipe(name: str) -> RunConfig:
    return compose(name)


@functools.cache
def paper_run(objective: str, model: str) -> RunConfig:
    """RAO's is a recipe, those that the paper compares it with choose the model and the paper's setting."""
    if objective == "rao":
        return recipe(f"gpt_rao_{model}")
    return compose(f"gpt_{objective}", [f"model={model}", "precision=bf16_mixed", "paper=rao_2026_baselines"])


def test_every_objective_has_its_settings_and_its_recipe_and_no_recipe_is_without_an_objective() -> None:
    of_models = {f"gpt_rao_{model}" for model in [*PAPER_MODELS, *LARGER_MODELS]}
    assert {path.stem for path in CONF.glob("objective/*.yaml")} == set(OBJECTIVES)
    of_samples = {f"gpt_{name}{model}" for name in ONLINE for model in ("", "_llama3_8b")}
    assert set(RECIPES) == {f"gpt_{name}" for name in OBJECTIVES} | of_models | of_samples


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_the_objective_of_its_name_and_passes_the_checks_of_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    config = copy.deepcopy(recipe(name))
    config.data.train_path, config.data.tokenizer = f"{tmp_path}/train.jsonl", str(tmp_path)
    config.model.restore_from_path = str(tmp_path)
    check_run(config, start_exists=False)
    objective = config.model.objective
    assert config.exp_manager.name == name
    others = [*PAPER_MODELS, *LARGER_MODELS, "online", "online_llama3_8b"]
    assert name == f"gpt_{objective}" or name.removeprefix(f"gpt_{objective}_") in others
    samples = name.removeprefix("gpt_").removesuffix("_llama3_8b") in ONLINE
    assert (config.online.num_generations is not None) == samples


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_opens_with_one_line_about_it_and_its_command(name: str) -> None:
    first, *others = (CONF / f"{name}.yaml").read_text().splitlines()
    assert first.startswith("# ") and first.endswith(".")
    assert any(line.startswith(f"#   nemo-rao train --config-name {name} ") for line in others)


@pytest.mark.parametrize(("objective", "model"), PAPER_RUNS)
def test_the_papers_runs_share_their_setting(objective: str, model: str) -> None:
    config = paper_run(objective, model)
    assert config.model.objective == objective
    assert (config.model.family, config.model.arch.num_layers) == PAPER_MODELS[model]
    assert (config.model.seq_length, config.trainer.max_epochs, config.data.num_responses) == (2048, 3, 2)
    assert (config.precision.params, config.trainer.devices) == ("bf16", 8)


def test_rao_has_the_reported_values() -> None:
    for model in PAPER_MODELS:
        config = recipe(f"gpt_rao_{model}")
        keys = objective_config(config)
        assert (keys.beta, keys.log_z0, config.model.optim.lr) == (0.1, 50.0, 5e-7)


@pytest.mark.parametrize("objective", PAPER_OBJECTIVES)
def test_the_papers_run_is_one_of_its_objectives_grid(objective: str) -> None:
    config = paper_run(objective, "llama3_8b")
    grid = yaml.safe_load((CONF / "search" / f"{objective}.yaml").read_text())["hydra"]["sweeper"]["params"]
    for key, values in grid.items():
        value: Any = config
        for part in key.split("."):
            value = vars(value)[part]
        assert value in map(float, str(values).split(",")), key
